"""What the pickle in a .pt may hold, found without running it.

A pickle is a program. torch.load(weights_only=True) runs it with few functions to call; before that its instructions
are listed here, and only those that dicts, lists, numbers, text and tensors need may go on.
"""

from __future__ import annotations

import io
from pickletools import genops

_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT SETITEM SETITEMS GLOBAL REDUCE BUILD BINPERSID".split()
)
_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 float8_e4m3fn float8_e5m2"
_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble"
_GLOBALS = frozenset(
    [f"torch._utils _rebuild_{name}" for name in ("tensor_v2", "tensor_v3", "parameter", "sparse_tensor")]
    + [f"torch {dtype}" for dtype in _DTYPES.split()]
    + [f"torch {kind}Storage" for kind in _STORAGES.split()]
    + ["collections OrderedDict", "torch.storage UntypedStorage", "torch Size", "torch device",
       "torch.serialization _get_layout"]
)
"""The only names that a file may refer to."""


def foreign(program: bytes) -> str | None:
    """The first thing in a pickle that weights do not need: a name, or an instruction. None where there is none.

    Raises ValueError for what is no pickle.
    """
    try:
        for opcode, argument, _ in genops(io.BytesIO(program)):
            if opcode.name == "GLOBAL" and argument not in _GLOBALS:
                return str(argument).replace(" ", ".")
            if opcode.name not in _OPCODES:
                return f"the instruction {opcode.name}"
    except (ValueError, IndexError, OverflowError) as error:
        raise ValueError(f"data.pkl is no pickle: {error}") from None
    return None

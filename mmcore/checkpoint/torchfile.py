"""PyTorch's .pt files: a zip archive of a pickle, data.pkl, and of the storages that it names.

A pickle is a program. This one is read by torch.load(weights_only=True) alone, after its instructions have been
listed without running any: they may build dicts, lists, numbers and text, and call nothing but PyTorch's functions
that rebuild a tensor. Storages are mapped from the file, so that only tensors that are used are read.
"""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from pickletools import genops
from typing import Any

import torch
from torch import Tensor

from mmcore.checkpoint import untrusted
from mmcore.checkpoint.untrusted import shown
from mmcore.errors import CheckpointError

_OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE "
    "BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT SETITEM SETITEMS GLOBAL REDUCE BUILD BINPERSID".split()
)
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_GLOBALS = frozenset(
    ("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")
    + tuple(f"torch {kind}Storage" for kind in _STORAGES)
)
"""The only names that a file may refer to."""
_PICKLE_BYTES = 64 << 20
_ENTRIES = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ZIP_FAULTS = (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError, RuntimeError, OverflowError,
               struct.error)  # fmt: skip


def read_torch_file(path: Path, *, verify: bool = True) -> Any:
    """What torch.save wrote: dicts, lists, numbers, text, and tensors on the CPU that are mapped from the file.

    verify: also compare the checksum of every part of the archive, which reads it whole. Raises CheckpointError for a
    file that is damaged, or that holds anything whose reading could run code.
    """
    size = untrusted.require_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            program = _check_archive(archive, path, size, verify)
    except _ZIP_FAULTS as error:
        raise CheckpointError(f"{path} is damaged or no .pt file ({shown(str(error))}): get it again") from error
    _check_program(program, path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # noqa: BLE001 (torch passes on whatever the bytes provoke)
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is damaged or no .pt file ({shown(first)}): get it again") from error


def plain_dict(value: Any) -> dict[Any, Any] | None:
    """A dict that was read from a file, as one whose methods are dict's own; None for anything else.

    A pickle can give an OrderedDict attributes that hide its methods."""
    return {key: item for key, item in dict.items(value)} if isinstance(value, dict) else None


def tensor_problem(tensor: Tensor, file_bytes: int) -> str | None:
    """Why a tensor that was read from a file is not one to load, or None."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return "is no dense tensor"
    if tensor.numel() * tensor.element_size() > min(file_bytes, tensor.untyped_storage().nbytes()):
        return "claims more numbers than the file holds"
    return None


def _check_archive(archive: zipfile.ZipFile, path: Path, size: int, verify: bool) -> bytes:
    """The pickle of an archive whose parts are stored plainly, each once, side by side."""
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names) or len(names) > _ENTRIES:
        raise ValueError("an entry appears twice, or there are too many")
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or any("/" not in name or ".." in name for name in names):
        raise ValueError("it is no archive of torch.save")
    root = roots.pop()
    if any(name.startswith((f"{root}/code/", f"{root}/constants")) for name in names):
        raise CheckpointError(f"{path} is a TorchScript program, which is never run: save the model's state_dict()")
    end = 0
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.file_size != entry.compress_size:
            raise ValueError(f"{entry.filename} is compressed or encrypted")
        if entry.header_offset < end:
            raise ValueError("its parts overlap")
        end = _end_of(archive, entry)
    if end > size:
        raise ValueError("it is cut short")
    order = f"{root}/byteorder"
    if order in names and archive.getinfo(order).file_size < 64 and archive.read(order) != b"little":
        raise ValueError("it was written by a big-endian machine")
    if verify and (bad := archive.testzip()):
        raise ValueError(f"{bad} was altered")
    program = next((entry for entry in entries if entry.filename == f"{root}/data.pkl"), None)
    if program is None or program.file_size > _PICKLE_BYTES:
        raise ValueError("it has no data.pkl, or one that is too large")
    return archive.read(program)


def _end_of(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes end, by its own header, which may be longer than the directory's copy."""
    archive.fp.seek(entry.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(archive.fp.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise ValueError(f"{entry.filename} does not begin as a part of an archive")
    return entry.header_offset + _LOCAL_HEADER.size + name + extra + entry.file_size


def _check_program(program: bytes, path: Path) -> None:
    """Raise CheckpointError where the pickle holds an instruction or a name that weights do not need."""
    try:
        for opcode, argument, _ in genops(io.BytesIO(program)):
            if opcode.name == "GLOBAL" and argument not in _GLOBALS:
                name = ".".join(str(argument).split(" "))
                raise CheckpointError(
                    f"{path} refers to {shown(name)}, which only code could make, and no code of a file is run: save "
                    f"only dicts, numbers, text and tensors, as torch.save(model.state_dict(), ...) does"
                )
            if opcode.name not in _OPCODES:
                raise CheckpointError(
                    f"{path} holds the pickle instruction {opcode.name}, which weights do not need, and it is not run: "
                    f"save it again with torch.save"
                )
    except (ValueError, IndexError, OverflowError, UnicodeError) as error:
        raise CheckpointError(f"{path} is damaged ({shown(str(error))}): get it again") from error

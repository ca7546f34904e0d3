"""Compile Triton kernels for an H100 where there is none: the compiler and ptxas come with Triton.

Not right results, but everything else that can fail before a kernel runs: types, layouts, shared memory, registers.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmcore.kernels import tuning

SHARED_LIMIT = 232_448  # bytes of shared memory that one program may have on an H100
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8",
}


@dataclass
class Compiled:
    """One kernel in one configuration."""

    name: str
    config: str
    shared: int
    registers: int
    spilled: int

    def __str__(self) -> str:
        return f"{self.name} {self.config}: {self.shared} B shared, {self.registers} registers, {self.spilled} B spilled"


class Launches:
    """Within it Triton kernels are not run but remembered: (kernel, arguments, constants, configurations)."""

    def __enter__(self) -> Launches:
        self.calls: list[tuple] = []
        self._before = tuning.Tuned.__call__

        def remember(tuned, grid, *arguments, on, **constants):
            self.calls.append((tuned._kernel, arguments, constants, tuned.configs))

        tuning.Tuned.__call__ = remember
        return self

    def __exit__(self, *_) -> None:
        tuning.Tuned.__call__ = self._before


def compile_all(launches: Launches, every: bool = False) -> list[Compiled]:
    """Compile what was launched, in the first configuration or in `every` one, for compute capability 9.0."""
    results, done = [], set()
    for kernel, arguments, constants, configs in launches.calls:
        for config in configs if every else configs[:1]:
            mark = (id(kernel), str(config), str(constants), tuple(_type(a) for a in arguments))
            if mark not in done:
                done.add(mark)
                results.append(_compile(kernel, arguments, constants, config))
    return results


def _type(value) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return {int: "i32", float: "fp32"}[type(value)]


def _compile(kernel, arguments, constants, config) -> Compiled:
    names = kernel.arg_names
    signature, values, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(names, arguments, strict=False)):
        moving = kernel.params[index].do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and not moving):  # as the launcher specializes
            signature[name], values[(index,)] = "constexpr", value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (value % 16 == 0 and not moving):
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name, value in {**constants, **config.kwargs}.items():
        signature[name], values[(names.index(name),)] = "constexpr", value
    source = ASTSource(fn=kernel, signature={n: signature[n] for n in names}, constexprs=values, attrs=attributes)
    options = {name: value for name, value in config.all_kwargs().items() if name not in config.kwargs}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, spilled = _resources(made.asm["cubin"])
    what = {**options, **config.kwargs, **{k: v for k, v in constants.items() if len(k) < 9}}
    return Compiled(kernel.fn.__name__, str(what), made.metadata.shared, registers, spilled)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack: spilled registers)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])

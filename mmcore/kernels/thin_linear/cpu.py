"""thin_linear in C. A decoder calls it some 30 times a token, so what Python does around the call is counted in
microseconds: the weights are looked at once, no tensor is made but the result and its views, and the only ctypes
objects are two arrays. Addresses are read at every call, so a weight may be moved or converted in between."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels import native, registry

_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    mm_thin_linear=[ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 4 + [ctypes.c_int] * 2,
)
_READABLE = (torch.float32, torch.bfloat16)


MOST_ROWS = 16
"""Rows of x up to which the compiled kernel is used; a library's matrix product is better with more."""


class Prepared(NamedTuple):
    """What the C function needs to know of a call."""

    rows: int
    outs: list[int]
    addresses: list[int]
    widened: bool


def prepare(x: Tensor, weights: Sequence[Tensor], most_rows: int) -> Prepared | str:
    """The facts of the call, or the reason why the C kernel cannot take these tensors. Raises ValueError where no
    implementation could."""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    dtype = weights[0].dtype if weights else torch.float32
    outs, addresses, uniform = [], [], True
    for weight in weights:
        out, inside = weight.shape
        if inside != width:
            raise ValueError(f"thin_linear: x is {list(x.shape)} and a weight {[out, inside]}: give [{out}, {width}]")
        uniform = uniform and weight.dtype is dtype and weight.is_contiguous() and weight.is_cpu
        outs.append(out)
        addresses.append(weight.data_ptr())
    if x.dtype is not torch.float32:
        return f"x is {x.dtype}, and the kernel computes in torch.float32"
    if not 1 <= rows <= most_rows:
        return f"x has {rows} rows, and the kernel is for 1 to {most_rows}"
    if dtype not in _READABLE:
        return f"the weights are {dtype}, and the kernel reads torch.float32 and torch.bfloat16"
    if not uniform:
        return "the weights are not contiguous CPU tensors of one dtype"
    return Prepared(rows, outs, addresses, dtype is torch.bfloat16)


@functools.cache
def _arrays(count: int) -> tuple[type, type]:
    return ctypes.c_void_p * count, ctypes.c_int64 * count


def thin_linears(x: Tensor, call: Prepared) -> list[Tensor]:
    """As in `mmcore.kernels.thin_linear`, for a prepared call."""
    rows, outs, addresses, widened = call
    x = x.contiguous()
    *lead, width = x.shape
    total = sum(outs)
    results = torch.empty(*lead, total) if rows == 1 else torch.empty(rows * total)
    scratch = torch.empty(rows * width) if widened else x
    pointers, sizes = _arrays(len(outs))
    _C.mm_thin_linear(
        x.data_ptr(), rows, width, len(outs), pointers(*addresses), sizes(*outs),
        results.data_ptr(), scratch.data_ptr(), widened, torch.get_num_threads(),
    )
    if rows == 1:
        return [results] if len(outs) == 1 else list(results.split(outs, -1))
    parts = results.split([rows * out for out in outs])
    return [part.view(*lead, out) for part, out in zip(parts, outs, strict=True)]


def _run(x: Tensor, weight: Tensor) -> Tensor:
    call = prepare(x, (weight,), MOST_ROWS)
    return thin_linears(x, call)[0] if not isinstance(call, str) else F.linear(x, weight.to(x.dtype))


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


traced = registry.operator("thin_linear_cpu(Tensor x, Tensor weight) -> Tensor", _run, _fake)
"""One product as an operator, for torch.compile; calls that are not traced do without."""

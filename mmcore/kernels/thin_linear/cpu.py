"""thin_linear in C. A decoder calls it some 30 times a token, so what Python does around the call is counted in
microseconds: no tensor is made but the result and its views, and no per-argument ctypes objects but two arrays."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmcore.kernels import native

_DTYPES = (torch.float32, torch.bfloat16)


def why_not(x: Tensor, weights: Sequence[Tensor], most_rows: int) -> str | None:
    """The reason why the C kernel cannot take these tensors, or None."""
    if x.dtype is not torch.float32:
        return f"x is {x.dtype}, and the kernel computes in torch.float32"
    rows = x.numel() // max(1, x.shape[-1])
    if rows > most_rows:
        return f"x has {rows} rows, and the kernel is for at most {most_rows}"
    dtype = weights[0].dtype if weights else torch.float32
    if dtype not in _DTYPES:
        return f"the weights are {dtype}, and the kernel reads torch.float32 and torch.bfloat16"
    for weight in weights:
        if weight.dtype is not dtype or not weight.is_contiguous() or weight.is_cuda:
            return "the weights are not contiguous CPU tensors of one dtype"
    return None


@functools.cache
def _function() -> ctypes._CFuncPtr:
    function = native.load(Path(__file__).with_name("cpu.c")).mm_thin_linear
    function.argtypes = [ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 4 + [ctypes.c_int] * 2
    function.restype = None
    return function


@functools.cache
def _arrays(count: int) -> tuple[type, type]:
    return ctypes.c_void_p * count, ctypes.c_int64 * count


def thin_linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """As in `mmcore.kernels.thin_linear`, for what `why_not` lets through."""
    x = x.contiguous()
    *lead, width = x.shape
    rows = x.numel() // width if width else 0
    outs = [len(weight) for weight in weights]
    if not rows or not outs:
        return [x.new_zeros(*lead, out) for out in outs]
    widened = weights[0].dtype is torch.bfloat16
    total = sum(outs)
    results = torch.empty((*lead, total)) if rows == 1 else torch.empty(rows * total)
    scratch = torch.empty(rows * width) if widened else x
    pointers, sizes = _arrays(len(outs))
    _function()(
        x.data_ptr(), rows, width, len(outs), pointers(*[weight.data_ptr() for weight in weights]), sizes(*outs),
        results.data_ptr(), scratch.data_ptr(), widened, torch.get_num_threads(),
    )
    if rows == 1:
        return [results] if len(outs) == 1 else list(results.split(outs, -1))
    parts = results.split([rows * out for out in outs])
    return [part.view(*lead, out) for part, out in zip(parts, outs, strict=True)]

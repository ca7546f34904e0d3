"""thin_linear in C. A decoder of many rows calls it some ten times a layer, so what Python does around the call is
counted in microseconds: no tensor is made but the result and x in the order in which it is read. Addresses are read at
every call, so a weight may be moved or converted in between."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmcore.kernels import native, registry
from mmcore.kernels.layout import FLOATS
from mmcore.kernels.thin_linear import reference

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64
_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    mm_thin_linear=[_ADDRESS, _INT, _INT, _ADDRESS, _ADDRESS, _INT, _ADDRESS, _ADDRESS] + [ctypes.c_int] * 2,
    mm_thin_linear_scratch=(_INT, [_INT] * 2),
)

MOST_ROWS = 16
"""Rows of x up to which the compiled kernel is used; a library's matrix product is better with more."""

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""As in weight_formats.h."""


def why_not(x: Tensor, weight: Tensor, scale: Tensor | None) -> str | None:
    """The reason why the C kernel cannot take these tensors, or None."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if x.dtype is not torch.float32:
        return f"x is {x.dtype}, and the kernel computes in torch.float32"
    if not 1 <= rows <= MOST_ROWS:
        return f"x has {rows} rows, and the kernel is for 1 to {MOST_ROWS}"
    if weight.dtype not in FORMATS or (weight.dtype is torch.int8) != (scale is not None):
        return f"the weight is {weight.dtype}, and the kernel reads torch.float32, torch.bfloat16, or torch.int8 with scales"
    if not (weight.is_contiguous() and weight.is_cpu):
        return "the weight is no contiguous CPU tensor"
    if scale is not None and not (scale.dtype is torch.float32 and scale.is_contiguous() and scale.is_cpu):
        return "the scales are no contiguous fp32 tensor on the CPU"
    return None


def thin_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """As in `mmcore.kernels.thin_linear`, for tensors that `why_not` has no reason against."""
    x = x.contiguous()
    out, width = weight.shape
    y = x.new_empty(*x.shape[:-1], out)
    rows = x.numel() // width
    scratch = torch.empty(_C.mm_thin_linear_scratch(rows, width), **FLOATS)
    _C.mm_thin_linear(
        x.data_ptr(), rows, width, weight.data_ptr(), None if scale is None else scale.data_ptr(), out,
        y.data_ptr(), scratch.data_ptr(), FORMATS[weight.dtype], torch.get_num_threads(),
    )
    return y


def _run(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    form = reference.library_linear if why_not(x, weight, scale) else thin_linear
    return form(x, weight, scale)


def _fake(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


traced = registry.operator("thin_linear_cpu(Tensor x, Tensor weight, Tensor? scale) -> Tensor", _run, _fake)
"""The product as an operator, for torch.compile and whoever else looks on; other calls do without."""


@register_flop_formula(torch.ops.mm.thin_linear_cpu)
def _flops(x_shape, weight_shape, *_, **__) -> int:
    return 2 * math.prod(x_shape[:-1]) * math.prod(weight_shape)

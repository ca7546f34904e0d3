"""Look-ahead values in C: one pass over memory each way, in fp32."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.errors import ConfigError
from mmcore.kernels import native
from mmcore.kernels.layout import threads_for, with_heads_together

_FP32 = {torch.float32}
_FORWARD = struct.Struct("5P7n")  # `Forward` in cpu.c


def look_ahead(raw_values: Tensor, mix: Tensor, scale: Tensor, following: Tensor | None = None) -> Tensor:
    """See `mmcore.kernels.look_ahead.look_ahead`. fp16 and bf16 are converted on the way in and out.

    Raises ConfigError for fp64, which this form would round.
    """
    dtype = raw_values.dtype
    if following is None:
        batch, _, heads, size = raw_values.shape
        following = torch.zeros(batch, heads, size)
    dtypes = {dtype, mix.dtype, scale.dtype, following.dtype}
    if dtypes != _FP32:
        if torch.float64 in dtypes:
            raise ConfigError("look_ahead computes in fp32 as 'cpu': use implementation='blocked' for fp64")
        raw_values, mix, scale, following = raw_values.float(), mix.float(), scale.float(), following.float()
    if torch.is_grad_enabled() and (
        raw_values.requires_grad or mix.requires_grad or scale.requires_grad or following.requires_grad
    ):
        values = _LookAhead.apply(raw_values, mix, scale, following)
    else:
        values = _forward(raw_values, mix, scale, following)
    return values if dtype is torch.float32 else values.to(dtype)


class _LookAhead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, mix, scale, following):
        raw = with_heads_together(raw)
        mix, scale, following = mix.contiguous(), scale.contiguous(), following.contiguous()
        ctx.save_for_backward(raw, mix, scale, following)
        return _forward(raw, mix, scale, following)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        raw, mix, scale, following = ctx.saved_tensors
        grad = with_heads_together(grad)
        heads, size = raw.shape[2:]
        threads = threads_for(raw.numel())
        grad_raw, grad_following = torch.empty(raw.shape), torch.zeros(following.shape)
        scratch = torch.empty(threads, 2, heads, size)
        sums = torch.zeros(threads, 2, heads, dtype=torch.float64)
        _library().look_ahead_backward(
            raw.data_ptr(), following.data_ptr(), mix.data_ptr(), scale.data_ptr(), grad.data_ptr(),
            grad_raw.data_ptr(), grad_following.data_ptr(), scratch.data_ptr(), sums.data_ptr(),
            *raw.shape, *raw.stride()[:2], *grad.stride()[:2], threads,
        )  # fmt: skip
        grad_mix, grad_scale = sums.sum(0).float()
        return grad_raw, grad_mix, grad_scale, grad_following


def _forward(raw: Tensor, mix: Tensor, scale: Tensor, following: Tensor) -> Tensor:
    raw = with_heads_together(raw)
    if not (following.is_contiguous() and mix.is_contiguous() and scale.is_contiguous()):
        following, mix, scale = following.contiguous(), mix.contiguous(), scale.contiguous()
    values = torch.empty_like(raw, memory_format=torch.contiguous_format)  # 1.5 us; torch.empty(shape) takes 3
    batch, time, heads, size = raw.shape
    row, step, _, _ = raw.stride()
    arguments = _FORWARD.pack(
        raw.data_ptr(), following.data_ptr(), mix.data_ptr(), scale.data_ptr(), values.data_ptr(),
        batch, time, heads, size, row, step, threads_for(batch * time * heads * size),
    )  # fmt: skip
    _library().look_ahead_forward(arguments)
    return values


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(Path(__file__).with_name("cpu.c"))
    address, count = ctypes.c_void_p, ctypes.c_ssize_t
    library.look_ahead_forward.argtypes = [ctypes.c_char_p]
    library.look_ahead_backward.argtypes = [address] * 9 + [count] * 8 + [ctypes.c_int]
    library.look_ahead_forward.restype = library.look_ahead_backward.restype = None
    return library

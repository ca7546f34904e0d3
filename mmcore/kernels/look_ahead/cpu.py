"""Look-ahead values in C: one pass over memory each way, in fp32."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import native, registry
from mmcore.kernels.layout import FLOATS, threads_for, with_heads_together

_FP32 = {torch.float32}
_FORWARD = struct.Struct("5P7n")  # `Forward` in cpu.c
_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    look_ahead_forward=[ctypes.c_char_p],
    look_ahead_backward=[ctypes.c_void_p] * 9 + [ctypes.c_ssize_t] * 8 + [ctypes.c_int],
)


def look_ahead(raw_values: Tensor, mix: Tensor, scale: Tensor, following: Tensor | None = None) -> Tensor:
    """See `mmcore.kernels.look_ahead.look_ahead`. fp16 and bf16 are converted on the way in and out.

    Raises ConfigError for fp64, which this form would round.
    """
    dtype = raw_values.dtype
    if following is None:
        batch, _, heads, size = raw_values.shape
        following = raw_values.new_zeros(batch, heads, size)
    dtypes = {dtype, mix.dtype, scale.dtype, following.dtype}
    if dtypes != _FP32:
        if torch.float64 in dtypes:
            raise ConfigError("look_ahead computes in fp32 as 'cpu': use implementation='blocked' for fp64")
        raw_values, mix, scale, following = raw_values.float(), mix.float(), scale.float(), following.float()
    form = _run if registry.direct(raw_values) else _values
    values = form(raw_values, mix, scale, following)
    return values if dtype is torch.float32 else values.to(dtype)


def _fake(raw, mix, scale, following):
    return raw.new_empty(raw.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return _values_backward(grad, *ctx.saved_tensors)


def _run_backward(grad, raw, mix, scale, following):
    raw, grad = with_heads_together(raw), with_heads_together(grad)
    mix, scale, following = mix.contiguous(), scale.contiguous(), following.contiguous()
    heads, size = raw.shape[2:]
    threads = threads_for(raw.numel())
    grad_raw, grad_following = torch.empty(raw.shape, **FLOATS), torch.zeros(following.shape, **FLOATS)
    scratch = torch.empty(threads, 2, heads, size, **FLOATS)
    sums = torch.zeros(threads, 2, heads, dtype=torch.float64, device="cpu")
    _C.look_ahead_backward(
        raw.data_ptr(), following.data_ptr(), mix.data_ptr(), scale.data_ptr(), grad.data_ptr(),
        grad_raw.data_ptr(), grad_following.data_ptr(), scratch.data_ptr(), sums.data_ptr(),
        *raw.shape, *raw.stride()[:2], *grad.stride()[:2], threads,
    )  # fmt: skip
    grad_mix, grad_scale = (part.float() for part in sums.sum(0))
    return grad_raw, grad_mix, grad_scale, grad_following


def _fake_backward(grad, raw, mix, scale, following):
    return tuple(raw.new_empty(part.shape) for part in (raw, mix, scale, following))


def _run(raw: Tensor, mix: Tensor, scale: Tensor, following: Tensor) -> Tensor:
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
    _C.look_ahead_forward(arguments)
    return values


_values = registry.operator(
    "look_ahead_cpu(Tensor raw_values, Tensor mix, Tensor scale, Tensor following) -> Tensor",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_values_backward = registry.operator(
    "look_ahead_cpu_backward(Tensor grad, Tensor raw_values, Tensor mix, Tensor scale, Tensor following)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip

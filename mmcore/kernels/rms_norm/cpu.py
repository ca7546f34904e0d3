"""RMSNorm in C: one pass over memory each way, in fp32."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import native, registry
from mmcore.kernels.layout import FLOATS, rows_of, threads_for

_FORWARD = struct.Struct("4P4nd")  # `Forward` in cpu.c
_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    rms_norm_forward=[ctypes.c_char_p],
    rms_norm_backward=[ctypes.c_void_p] * 6 + [ctypes.c_ssize_t] * 4 + [ctypes.c_int],
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mmcore.kernels.rms_norm.rms_norm`. fp16 and bf16 are converted on the way in and out.

    Raises ConfigError for fp64, which this form would round.
    """
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return _converted(x, weight, eps)
    if registry.direct(x):
        return _forward(x, weight, eps, None)
    return _norm(x, weight, eps)[0]


def _converted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.float64 in (x.dtype, weight.dtype):
        raise ConfigError("rms_norm computes in fp32 as 'cpu': use implementation='blocked' for fp64")
    if x.dtype is torch.float32:
        return rms_norm(x, weight.float(), eps)
    # The quotient is rounded to x's dtype before it meets the weight, as the definition has it.
    return rms_norm(x.float(), torch.ones_like(weight, dtype=torch.float32), eps).to(x.dtype) * weight


def _run(x, weight, eps):
    rstd = torch.empty(x.shape[:-1], **FLOATS)
    return _forward(x, weight, eps, rstd), rstd


def _fake(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _gradients(ctx, grad, _):
    return *_norm_backward(grad, *ctx.saved_tensors), None


def _run_backward(grad, x, weight, rstd):
    grad_x = torch.empty(x.shape, **FLOATS)
    grad, grad_row = rows_of(grad)
    x, x_row = rows_of(x)
    weight = weight.contiguous()
    threads, size = threads_for(x.numel()), x.shape[-1]
    partial = torch.zeros(threads, size, **FLOATS)
    _C.rms_norm_backward(
        grad.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), grad_x.data_ptr(), partial.data_ptr(),
        rstd.numel(), size, grad_row, x_row, threads,
    )  # fmt: skip
    return grad_x, partial.sum(0)


def _fake_backward(grad, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_norm = registry.operator(
    "rms_norm_cpu(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_norm_backward = registry.operator(
    "rms_norm_cpu_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


def _forward(x: Tensor, weight: Tensor, eps: float, rstd: Tensor | None) -> Tensor:
    """y; fills `rstd` if there is one."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)  # 1.5 us; torch.empty(shape) takes 3
    x, row = rows_of(x)
    if not weight.is_contiguous():
        weight = weight.contiguous()
    count, size = x.numel(), x.shape[-1]
    arguments = _FORWARD.pack(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), 0 if rstd is None else rstd.data_ptr(),
        count // size, size, row, threads_for(count), eps,
    )  # fmt: skip
    _C.rms_norm_forward(arguments)
    return y

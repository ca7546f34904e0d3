"""RMSNorm in C: one pass over memory each way, in fp32."""

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
from mmcore.kernels.layout import rows_of, threads_for

_FORWARD = struct.Struct("4P4nd")  # `Forward` in cpu.c


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mmcore.kernels.rms_norm.rms_norm`. fp16 and bf16 are converted on the way in and out.

    Raises ConfigError for fp64, which this form would round.
    """
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32:
        return _converted(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _forward(x, weight, eps, None)


def _converted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.float64 in (x.dtype, weight.dtype):
        raise ConfigError("rms_norm computes in fp32 as 'cpu': use implementation='blocked' for fp64")
    if x.dtype is torch.float32:
        return rms_norm(x, weight.float(), eps)
    # The quotient is rounded to x's dtype before it meets the weight, as the definition has it.
    return rms_norm(x.float(), torch.ones(weight.shape), eps).to(x.dtype) * weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = torch.empty(x.shape[:-1])
        y = _forward(x, weight, eps, rstd)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        grad_x = torch.empty(x.shape)
        grad, grad_row = rows_of(grad)
        x, x_row = rows_of(x)
        weight = weight.contiguous()
        threads, size = threads_for(x.numel()), x.shape[-1]
        partial = torch.zeros(threads, size)
        _library().rms_norm_backward(
            grad.data_ptr(), x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), grad_x.data_ptr(), partial.data_ptr(),
            rstd.numel(), size, grad_row, x_row, threads,
        )  # fmt: skip
        return grad_x, partial.sum(0), None


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
    _library().rms_norm_forward(arguments)
    return y


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(Path(__file__).with_name("cpu.c"))
    address, count = ctypes.c_void_p, ctypes.c_ssize_t
    library.rms_norm_forward.argtypes = [ctypes.c_char_p]
    library.rms_norm_backward.argtypes = [address] * 6 + [count] * 4 + [ctypes.c_int]
    library.rms_norm_forward.restype = library.rms_norm_backward.restype = None
    return library

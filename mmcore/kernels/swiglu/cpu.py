"""SwiGLU in C: one pass over memory each way, in fp32."""

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

_FORWARD = struct.Struct("3P5n")  # `Forward` in cpu.c


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `mmcore.kernels.swiglu.swiglu`. fp16 and bf16 are converted on the way in and out.

    Raises ConfigError for fp64, which this form would round.
    """
    if gate.dtype is not torch.float32:
        if gate.dtype is torch.float64:
            raise ConfigError("swiglu computes in fp32 as 'cpu': use implementation='blocked' for fp64")
        return swiglu(gate.float(), up.float()).to(gate.dtype)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return _forward(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty(gate.shape), torch.empty(gate.shape)
        grad, grad_row = rows_of(grad)
        gate, gate_row = rows_of(gate)
        up, up_row = rows_of(up)
        count, size = gate.numel(), gate.shape[-1]
        _library().swiglu_backward(
            grad.data_ptr(), gate.data_ptr(), up.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr(),
            count // size, size, grad_row, gate_row, up_row, threads_for(count),
        )  # fmt: skip
        return grad_gate, grad_up


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)  # 1.5 us; torch.empty(shape) takes 3
    gate, gate_row = rows_of(gate)
    up, up_row = rows_of(up)
    count, size = gate.numel(), gate.shape[-1]
    arguments = _FORWARD.pack(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), count // size, size, gate_row, up_row, threads_for(count)
    )
    _library().swiglu_forward(arguments)
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(Path(__file__).with_name("cpu.c"))
    address, count = ctypes.c_void_p, ctypes.c_ssize_t
    library.swiglu_forward.argtypes = [ctypes.c_char_p]
    library.swiglu_backward.argtypes = [address] * 5 + [count] * 5 + [ctypes.c_int]
    library.swiglu_forward.restype = library.swiglu_backward.restype = None
    return library

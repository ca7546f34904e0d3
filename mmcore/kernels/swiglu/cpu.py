"""SwiGLU in C: one pass over memory each way, of fp32 or of bf16, computed in fp32."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import native, registry
from mmcore.kernels.layout import rows_of, threads_for

_FORWARD = struct.Struct("3P6n")  # `Forward` in cpu.c
_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    swiglu_forward=[ctypes.c_char_p],
    swiglu_backward=[ctypes.c_void_p] * 5 + [ctypes.c_ssize_t] * 5 + [ctypes.c_int] * 2,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `mmcore.kernels.swiglu.swiglu`. fp16 is converted on the way in and out.

    Raises ConfigError for fp64, which this form would round.
    """
    if gate.dtype not in (torch.float32, torch.bfloat16):
        if gate.dtype is torch.float64:
            raise ConfigError("swiglu computes in fp32 as 'cpu': use implementation='blocked' for fp64")
        return swiglu(gate.float(), up.float()).to(gate.dtype)
    return _run(gate, up) if registry.direct(gate) else _gated(gate, up)


def _fake(gate, up):
    return gate.new_empty(gate.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return _gated_backward(grad, *ctx.saved_tensors)


def _run_backward(grad, gate, up):
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device="cpu") for _ in range(2))
    grad, grad_row = rows_of(grad)
    gate, gate_row = rows_of(gate)
    up, up_row = rows_of(up)
    count, size = gate.numel(), gate.shape[-1]
    _C.swiglu_backward(
        grad.data_ptr(), gate.data_ptr(), up.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr(),
        count // size, size, grad_row, gate_row, up_row, gate.dtype is torch.bfloat16, threads_for(count),
    )  # fmt: skip
    return grad_gate, grad_up


def _fake_backward(grad, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _run(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)  # 1.5 us; torch.empty(shape) takes 3
    gate, gate_row = rows_of(gate)
    up, up_row = rows_of(up)
    count, size = gate.numel(), gate.shape[-1]
    arguments = _FORWARD.pack(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), count // size, size, gate_row, up_row, threads_for(count),
        gate.dtype is torch.bfloat16,
    )  # fmt: skip
    _C.swiglu_forward(arguments)
    return out


_gated = registry.operator("swiglu_cpu(Tensor gate, Tensor up) -> Tensor", _run, _fake, keep=_keep, backward=_gradients)
_gated_backward = registry.operator(
    "swiglu_cpu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)", _run_backward, _fake_backward
)

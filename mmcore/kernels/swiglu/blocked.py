"""SwiGLU on any device, keeping gate and up only for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `mmcore.kernels.swiglu.swiglu`."""
    return _SwiGLU.apply(gate, up)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return (F.silu(_precise(gate)) * _precise(up)).to(gate.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        gate_, up_, grad_ = _precise(gate), _precise(up), _precise(grad)
        sigmoid = torch.sigmoid(gate_)
        silu = gate_ * sigmoid
        grad_gate = grad_ * up_ * (sigmoid + silu * (1 - sigmoid))
        return grad_gate.to(gate.dtype), (grad_ * silu).to(up.dtype)

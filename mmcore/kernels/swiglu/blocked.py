"""SwiGLU on any device, keeping gate and up only for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels import registry


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `mmcore.kernels.swiglu.swiglu`."""
    return _gated(gate, up)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _run(gate, up):
    return (F.silu(_precise(gate)) * _precise(up)).to(gate.dtype).contiguous()


def _fake(gate, up):
    return gate.new_empty(gate.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return _gated_backward(grad, *ctx.saved_tensors)


def _run_backward(grad, gate, up):
    gate_, up_, grad_ = _precise(gate), _precise(up), _precise(grad)
    sigmoid = torch.sigmoid(gate_)
    silu = gate_ * sigmoid
    grad_gate = grad_ * up_ * (sigmoid + silu * (1 - sigmoid))
    return grad_gate.to(gate.dtype).contiguous(), (grad_ * silu).to(up.dtype).contiguous()


def _fake_backward(grad, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_gated = registry.operator(
    "swiglu_blocked(Tensor gate, Tensor up) -> Tensor", _run, _fake, keep=_keep, backward=_gradients
)
_gated_backward = registry.operator(
    "swiglu_blocked_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)", _run_backward, _fake_backward
)

"""RMSNorm on any device, keeping x and one number a row for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels import registry


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mmcore.kernels.rms_norm.rms_norm`."""
    return _norm(x, weight, eps)[0]


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _run(x, weight, eps):
    precise = _precise(x)
    rstd = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + eps)
    return ((precise * rstd).to(x.dtype) * weight).contiguous(), rstd.contiguous()


def _fake(x, weight, eps):
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)), rstd


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _gradients(ctx, grad, _):
    return *_norm_backward(grad, *ctx.saved_tensors), None


def _run_backward(grad, x, weight, rstd):
    grad = grad.to(rstd.dtype)
    quotient = _precise(x) * rstd
    grad_weight = (grad * quotient).flatten(0, -2).sum(0)
    grad_quotient = grad * weight
    along = (grad_quotient * quotient).mean(-1, keepdim=True)
    grad_x = (grad_quotient - quotient * along) * rstd
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def _fake_backward(grad, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_norm = registry.operator(
    "rms_norm_blocked(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_norm_backward = registry.operator(
    "rms_norm_blocked_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip

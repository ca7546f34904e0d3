"""RMSNorm on any device, keeping x and one number a row for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mmcore.kernels.rms_norm.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        precise = _precise(x)
        rstd = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (precise * rstd).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        quotient = _precise(x) * rstd
        grad_weight = (grad * quotient).flatten(0, -2).sum(0)
        grad_quotient = grad * weight
        along = (grad_quotient * quotient).mean(-1, keepdim=True)
        grad_x = (grad_quotient - quotient * along) * rstd
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)

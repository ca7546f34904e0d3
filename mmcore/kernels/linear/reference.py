"""The definition of linear, and the library's products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels import registry
from mmcore.kernels.dispatch import autocasting


def linear(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """y_i[..., o] = sum_k x[..., k] w_i[o, k] scale_i[o], in x's dtype."""
    return [(x[..., None, :] * weight).sum(-1) for weight in _widened(x, weights, scales)]


def library_linear(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None = None, rounded: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The same through F.linear, any dtype and device; under autocast in its dtype, with `rounded` for the weights."""
    if not autocasting(x.device.type):
        weights = _widened(x, weights, scales)
    elif scales is not None:
        weights = _widened(x.float(), weights, scales)
    rounded = rounded or [None] * len(weights)
    together = x.is_cuda and x.numel() >= MANY * x.shape[-1]
    return thin_together(x, weights, rounded) if together else _each(x, weights, rounded)


def _each(x: Tensor, weights: Sequence[Tensor], rounded: Sequence[Tensor | None]) -> list[Tensor]:
    return [_product(x, weight, narrow) for weight, narrow in zip(weights, rounded, strict=True)]


def _product(x: Tensor, weight: Tensor, rounded: Tensor | None) -> Tensor:
    if not (x.is_cuda and torch.version.hip is None and torch.is_autocast_enabled("cuda")):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and weight.requires_grad and weight.dtype is torch.float32:
        return NarrowProduct.apply(x.to(torch.get_autocast_dtype("cuda")), weight, rounded)
    return F.linear(x, weight if rounded is None else rounded)


class NarrowProduct(torch.autograd.Function):
    """y = x W^T of x [..., in] in 16 bits and W [out, in] rounded to them, what autocast computes; but the gradient of W
    comes from its product in fp32, as it is summed there: rounding it to 16 bits and widening it again took 1 % of a
    training step of the 1.5b on an H100. `rounded` is W in 16 bits where it lies ready."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, rounded: Tensor | None = None) -> Tensor:
        if rounded is None:
            rounded = weight.to(x.dtype)
        ctx.save_for_backward(x, rounded, weight)  # this one for what depends on it: see `differentiable_once`
        return F.linear(x, rounded)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        return _narrow_gradients(ctx, grad)


def _of_narrow_product(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
    x, rounded, _ = ctx.saved_tensors
    grad_x = grad @ rounded if ctx.needs_input_grad[0] else None
    return grad_x, product_in_fp32(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1])), None


_narrow_gradients = registry.differentiable_once("linear", _of_narrow_product)


def product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a b of 16-bit matrices [n, k] and [k, m], in fp32 [n, m]."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


THIN = 64  # rows of a matrix whose product leaves a GPU all but idle
MANY = 1024  # rows of x from which on a copy of such matrices is nothing beside their products


def thin_together(x: Tensor, weights: Sequence[Tensor], rounded: Sequence[Tensor | None]) -> list[Tensor]:
    """The products, those with thin matrices as one. The gates' and decays' of the 1.5b recipe took 2 % of a step on an
    H200, each as long as both together."""
    pairs = list(zip(weights, rounded, strict=True))
    thin = [pair for pair in pairs if len(pair[0]) <= THIN]
    if len(thin) < 2:
        return _each(x, weights, rounded)
    thin_weights, thin_rounded = zip(*thin, strict=True)
    narrow = None if None in thin_rounded else torch.cat(thin_rounded)
    parts = iter(_product(x, torch.cat(thin_weights), narrow).split([len(weight) for weight in thin_weights], dim=-1))
    return [next(parts) if len(weight) <= THIN else _product(x, weight, narrow) for weight, narrow in pairs]


def _widened(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None) -> list[Tensor]:
    weights = [weight.to(x.dtype) for weight in weights]
    if scales is None:
        return weights
    return [weight * scale[:, None].to(x.dtype) for weight, scale in zip(weights, scales, strict=True)]

"""The definition of linear, and the library's products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """y_i[..., o] = sum_k x[..., k] w_i[o, k] scale_i[o], in x's dtype."""
    return [(x[..., None, :] * weight).sum(-1) for weight in _widened(x, weights, scales)]


def library_linear(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The same through F.linear, any dtype and device; under autocast in its dtype."""
    if not torch.is_autocast_enabled(x.device.type):
        weights = _widened(x, weights, scales)
    elif scales is not None:
        weights = _widened(x.float(), weights, scales)
    return thin_together(x, weights) if x.is_cuda and x.numel() >= MANY * x.shape[-1] else _each(x, weights)


def _each(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight) for weight in weights]


THIN = 64  # rows of a matrix whose product leaves a GPU all but idle
MANY = 1024  # rows of x from which on a copy of such matrices is nothing beside their products


def thin_together(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The products, those with thin matrices as one. The gates' and decays' of the 1.5b recipe took 2 % of a step on an
    H200, each as long as both together."""
    thin = [weight for weight in weights if len(weight) <= THIN]
    if len(thin) < 2:
        return _each(x, weights)
    parts = iter(F.linear(x, torch.cat(thin)).split([len(weight) for weight in thin], dim=-1))
    return [next(parts) if len(weight) <= THIN else F.linear(x, weight) for weight in weights]


def _widened(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None) -> list[Tensor]:
    weights = [weight.to(x.dtype) for weight in weights]
    if scales is None:
        return weights
    return [weight * scale[:, None].to(x.dtype) for weight, scale in zip(weights, scales, strict=True)]

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
    return [F.linear(x, weight) for weight in weights]


def _widened(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None) -> list[Tensor]:
    weights = [weight.to(x.dtype) for weight in weights]
    if scales is None:
        return weights
    return [weight * scale[:, None].to(x.dtype) for weight, scale in zip(weights, scales, strict=True)]

"""The look-ahead values of equation 9 in plain PyTorch: the definition of right."""

from __future__ import annotations

import torch
from torch import Tensor


def look_ahead(raw_values: Tensor, mix: Tensor, scale: Tensor, following: Tensor | None = None) -> Tensor:
    """See `mmcore.kernels.look_ahead.look_ahead`; differentiable by autograd, in fp32 or (for fp64 inputs) fp64."""
    precision = torch.float64 if raw_values.dtype == torch.float64 else torch.float32
    raw = raw_values.to(precision)
    mix, scale = mix.to(precision)[:, None], scale.to(precision)[:, None]
    last = raw.new_zeros(raw.shape[0], *raw.shape[2:]) if following is None else following.to(precision)
    mixed = mix * raw + (1 - mix) * torch.cat([raw[:, 1:], last[:, None]], dim=1)
    norm = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
    values = torch.where(norm == 0, 0, scale * mixed / torch.where(norm == 0, 1, norm))
    return values.to(raw_values.dtype)

"""Look-ahead values on any device, keeping the raw values only for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def look_ahead(raw_values: Tensor, mix: Tensor, scale: Tensor, following: Tensor | None = None) -> Tensor:
    """See `mmcore.kernels.look_ahead.look_ahead`."""
    precision = torch.float64 if raw_values.dtype == torch.float64 else torch.float32
    batch, _, heads, size = raw_values.shape
    last = raw_values.new_zeros(batch, heads, size) if following is None else following
    parts = (part.to(precision) for part in (raw_values, mix, scale, last))
    return _LookAhead.apply(*parts).to(raw_values.dtype)


class _LookAhead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, mix, scale, last):
        ctx.save_for_backward(raw, mix, scale, last)
        mixed, _, inverse = _mixed(raw, mix, last)
        return mixed.mul_(inverse * scale[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        raw, mix, scale, last = ctx.saved_tensors
        mixed, shifted, inverse = _mixed(raw, mix, last)
        unit = mixed.mul_(inverse)
        along = (grad * unit).sum(-1, keepdim=True)
        grad_mixed = (grad - unit * along) * (inverse * scale[:, None])
        grad_next = (1 - mix)[:, None] * grad_mixed
        grad_raw = mix[:, None] * grad_mixed
        grad_raw[:, 1:] += grad_next[:, :-1]
        grad_mix = (grad_mixed * (raw - shifted)).sum((0, 1, 3))
        grad_last = grad_next[:, -1] if raw.shape[1] else torch.zeros_like(last)
        return grad_raw, grad_mix, along.sum((0, 1, 3)), grad_last


def _mixed(raw: Tensor, mix: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """vbar, v~ one step on, and 1 / ||vbar|| (0 for 0)."""
    shifted = torch.cat([raw[:, 1:], last[:, None]], dim=1) if raw.shape[1] else raw
    # mix * raw + (1 - mix) * shifted: `lerp` would return shifted + mix * (raw - shifted), inexact at mix = 1.
    mixed = torch.addcmul(mix[:, None] * raw, (1 - mix)[:, None], shifted)
    norm = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
    return mixed, shifted, torch.where(norm == 0, 0, 1 / norm)

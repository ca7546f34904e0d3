"""Look-ahead values on any device, keeping the raw values only for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels import registry


def look_ahead(raw_values: Tensor, mix: Tensor, scale: Tensor, following: Tensor | None = None) -> Tensor:
    """See `mmcore.kernels.look_ahead.look_ahead`."""
    precision = torch.float64 if raw_values.dtype == torch.float64 else torch.float32
    batch, _, heads, size = raw_values.shape
    last = raw_values.new_zeros(batch, heads, size) if following is None else following
    parts = (part.to(precision) for part in (raw_values, mix, scale, last))
    return _values(*parts).to(raw_values.dtype)


def _run(raw, mix, scale, last):
    mixed, _, inverse = _mixed(raw, mix, last)
    return mixed.mul_(inverse * scale[:, None]).contiguous()


def _fake(raw, mix, scale, last):
    return raw.new_empty(raw.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return _values_backward(grad, *ctx.saved_tensors)


def _run_backward(grad, raw, mix, scale, last):
    mixed, shifted, inverse = _mixed(raw, mix, last)
    unit = mixed.mul_(inverse)
    along = (grad * unit).sum(-1, keepdim=True)
    grad_mixed = (grad - unit * along) * (inverse * scale[:, None])
    grad_next = (1 - mix)[:, None] * grad_mixed
    grad_raw = (mix[:, None] * grad_mixed).contiguous()
    grad_raw[:, 1:] += grad_next[:, :-1]
    grad_mix = (grad_mixed * (raw - shifted)).sum((0, 1, 3))
    grad_last = grad_next[:, -1].clone() if raw.shape[1] else torch.zeros_like(last)
    return grad_raw, grad_mix, along.sum((0, 1, 3)), grad_last.contiguous()


def _fake_backward(grad, raw, mix, scale, last):
    return tuple(raw.new_empty(part.shape) for part in (raw, mix, scale, last))


def _mixed(raw: Tensor, mix: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """vbar, v~ one step on, and 1 / ||vbar|| (0 for 0)."""
    shifted = torch.cat([raw[:, 1:], last[:, None]], dim=1) if raw.shape[1] else raw
    # mix * raw + (1 - mix) * shifted: `lerp` would return shifted + mix * (raw - shifted), inexact at mix = 1.
    mixed = torch.addcmul(mix[:, None] * raw, (1 - mix)[:, None], shifted)
    norm = torch.linalg.vector_norm(mixed, dim=-1, keepdim=True)
    return mixed, shifted, torch.where(norm == 0, 0, 1 / norm)


_values = registry.operator(
    "look_ahead_blocked(Tensor raw_values, Tensor mix, Tensor scale, Tensor following) -> Tensor",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_values_backward = registry.operator(
    "look_ahead_blocked_backward(Tensor grad, Tensor raw_values, Tensor mix, Tensor scale, Tensor following)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip

"""The gated key recurrence of equation 8, one step at a time: the definition of right."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_scan(
    raw_keys: Tensor,
    log_gates: Tensor,
    log_decays: Tensor,
    resets: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See `mmcore.kernels.gated_scan.gated_scan`; differentiable by autograd, in fp32 or (for fp64 inputs) fp64.

    The vector carried is kbar_t / exp(M_t) with the running maximum M_t = max(log_gate_t, log_decay_t + M_{t-1}), so
    that both weights of a step are at most 1, and one of them is 1. Keys do not depend on M, hence `detach`.
    """
    precision = torch.float64 if raw_keys.dtype == torch.float64 else torch.float32
    batch, _, heads, size = raw_keys.shape
    if state is None:
        vector = raw_keys.new_zeros(batch, heads, size, dtype=precision)
        log_scale = raw_keys.new_full((batch, heads), -torch.inf, dtype=precision)
    else:
        vector, log_scale = (part.detach().to(precision) for part in state)
    keys = []
    steps = (part.to(precision).unbind(1) for part in (raw_keys, log_gates, log_decays))
    for t, (raw, gate, decay) in enumerate(zip(*steps, strict=True)):
        carried = decay + log_scale
        if resets is not None:
            carried = carried.masked_fill(resets[:, t, None], -torch.inf)
            vector = vector.masked_fill(resets[:, t, None, None], 0)
        log_scale = torch.maximum(gate, carried).detach()
        vector = (gate - log_scale).exp()[..., None] * raw + (carried - log_scale).exp()[..., None] * vector
        keys.append(_unit(vector))
    stacked = torch.stack(keys, 1) if keys else torch.zeros_like(raw_keys)
    return stacked.to(raw_keys.dtype), (vector.detach(), log_scale.detach())


def _unit(vector: Tensor) -> Tensor:
    """vector / ||vector||; zero, with zero gradient, where the norm is zero."""
    norm = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0, vector / torch.where(norm == 0, 1, norm))

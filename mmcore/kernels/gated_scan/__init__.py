"""Unit-norm keys from a gated recurrence (equation 8)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels import dispatch
from mmcore.kernels.gated_scan import blocked, cpu, reference


def _triton(*arguments):
    """Imported with its first use: Triton takes half a second."""
    from mmcore.kernels.gated_scan import triton

    return triton.gated_scan(*arguments)


_TABLE = {"cpu": cpu.gated_scan, "triton": _triton, "blocked": blocked.gated_scan, "reference": reference.gated_scan}
_DOUBLE = {name: _TABLE[name] for name in ("blocked", "reference")}


def gated_scan(
    raw_keys: Tensor,
    log_gates: Tensor,
    log_decays: Tensor,
    *,
    resets: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """k_t = kbar_t / ||kbar_t||_2 with kbar_t = exp(log_gate_t) k~_t + exp(log_decay_t) kbar_{t-1}.

    raw_keys: k~ [B, T, H, D], fp16, bf16, fp32 or fp64. Any strides; slices of a fused projection are read in place.
    log_gates [B, T, H]: any finite number. log_decays [B, T, H]: at most 0.
    resets [B, T] bool: True where a document starts, i.e. where kbar_{t-1} counts as zero. None means never.
    state: (vector [B, H, D], log_scale [B, H]), both fp32 (fp64 for fp64 inputs), with kbar_{-1} = exp(log_scale)
    vector; None, or log_scale -inf, is the empty one. No gradient flows into it.

    Returns keys [B, T, H, D] in raw_keys' dtype and the state after the last step (detached). Sums are held in fp32
    (fp64 for fp64 inputs) relative to a running log-maximum, so no gate overflows or underflows. A zero kbar_t gives a
    zero key with zero gradient. Gradients flow to raw_keys, log_gates and log_decays.
    Raises ValueError for shapes that do not fit, and dispatch's errors for an implementation that cannot run.
    """
    if raw_keys.dim() != 4 or log_gates.shape != raw_keys.shape[:3] or log_decays.shape != log_gates.shape:
        raise ValueError(
            f"gated_scan got keys {tuple(raw_keys.shape)}, gates {tuple(log_gates.shape)} and decays "
            f"{tuple(log_decays.shape)}: give [B, T, H, D], [B, T, H] and [B, T, H]"
        )
    batch, time, heads, size = raw_keys.shape
    if resets is not None and (resets.shape != (batch, time) or resets.dtype != torch.bool):
        raise ValueError(f"gated_scan got resets {resets.dtype} {tuple(resets.shape)}: give bool {(batch, time)}")
    if state is not None and (state[0].shape != (batch, heads, size) or state[1].shape != (batch, heads)):
        raise ValueError(
            f"gated_scan got a state of {tuple(state[0].shape)} and {tuple(state[1].shape)}: "
            f"give {(batch, heads, size)} and {(batch, heads)}"
        )
    # The compiled forms compute in fp32: fp64, which asks for more, goes to a PyTorch form by itself.
    double = raw_keys.dtype == torch.float64 and implementation == "auto"
    run = dispatch.choose("gated_scan", _DOUBLE if double else _TABLE, implementation, raw_keys.device)
    return run(raw_keys, log_gates, log_decays, resets, state)

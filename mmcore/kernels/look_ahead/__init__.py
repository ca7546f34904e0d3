"""Unit-norm values that see one word ahead (equation 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels import dispatch
from mmcore.kernels.look_ahead import blocked, cpu, reference


def _triton(*arguments):
    """Imported with its first use: Triton takes half a second."""
    from mmcore.kernels.look_ahead import triton

    return triton.look_ahead(*arguments)


_TABLE = {"cpu": cpu.look_ahead, "triton": _triton, "blocked": blocked.look_ahead, "reference": reference.look_ahead}
_DOUBLE = {name: _TABLE[name] for name in ("blocked", "reference")}


def look_ahead(
    raw_values: Tensor,
    mix: Tensor,
    scale: Tensor,
    *,
    following: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """v_t = scale vbar_t / ||vbar_t||_2 with vbar_t = mix v~_t + (1 - mix) v~_{t+1}, per head.

    raw_values: v~ [B, T, H, D], fp16, bf16, fp32 or fp64. Any strides; slices of a fused projection are read in place.
    mix [H] is gamma; scale [H] is the value of alpha_psi (its exponential already taken).
    following [B, H, D]: v~ of the position after the last one; None means zeros. At the last position of a packed
    document vbar mixes in the next document: no query reads that pair, so nothing leaks.

    Returns values [B, T, H, D] in raw_values' dtype, computed in fp32 (fp64 for fp64 inputs). A zero vbar_t gives a
    zero value with zero gradient. Gradients flow to raw_values, mix, scale and following.
    Raises ValueError for shapes that do not fit, and dispatch's errors for an implementation that cannot run.
    """
    shape = raw_values.shape
    if len(shape) != 4 or mix.shape != shape[2:3] or scale.shape != shape[2:3]:
        raise ValueError(
            f"look_ahead got values {tuple(shape)}, mix {tuple(mix.shape)} and scale {tuple(scale.shape)}: "
            f"give [B, T, H, D], [H] and [H]"
        )
    if following is not None and following.shape != (shape[0], *shape[2:]):
        raise ValueError(f"look_ahead got following {tuple(following.shape)}: give [B, H, D] of values {tuple(shape)}")
    # The compiled forms compute in fp32: fp64, which asks for more, goes to a PyTorch form by itself.
    double = raw_values.dtype == torch.float64 and implementation == "auto"
    run = dispatch.choose("look_ahead", _DOUBLE if double else _TABLE, implementation, raw_values.device)
    return run(raw_values, mix, scale, following)

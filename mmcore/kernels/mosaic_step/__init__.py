"""One token of one conversation through a whole Memory Mosaic, at the speed the weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcore.errors import HardwareError
from mmcore.kernels import native
from mmcore.kernels.mosaic_step.cpu import Step


@dataclass(frozen=True)
class MemoryWeights:
    """One kind of memory of one layer. Matrices [d, d], [d, d], [H, d], [H, d]; the rest [H]: gamma, alpha_psi, beta_0,
    beta_1 and alpha as values. `window` and `delay` limit what is read, as in memory_read."""

    key: Tensor
    value: Tensor
    gate: Tensor
    decay: Tensor
    mix: Tensor
    scale: Tensor
    base: Tensor
    slope: Tensor
    exponent: Tensor
    window: int | None
    delay: int


@dataclass(frozen=True)
class LayerWeights:
    """One layer: norms [d], W_o [d, 2d], W_1 and W_3 [F, d], W_2 [d, F]."""

    memory_norm: Tensor
    short_term: MemoryWeights
    long_term: MemoryWeights
    out: Tensor
    persistent_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def why_not(matrices: Sequence[Tensor]) -> str | None:
    """The reason why these weights cannot take the compiled step, or None."""
    dtypes = {weight.dtype for weight in matrices}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.bfloat16}:
        return f"the weights are {sorted(map(str, dtypes))}, and the step reads all fp32 or all bf16"
    if not all(weight.is_cpu and weight.is_contiguous() for weight in matrices):
        return "the weights are not contiguous CPU tensors"
    return native.why_not()


def mosaic_step(layers: Sequence[LayerWeights], norm: Tensor, classifier: Tensor, heads: int, eps: float) -> Step:
    """Prepare the compiled step: a function `step(x, memories, position) -> logits`.

    x is the token's embedding, fp32 [d]; `memories` are the states of the layers' memories, short-term and long-term
    in turn, which have `scan`, `pending_key`, `pending_raw` and `store` (mmcore.model.state) and go on by one token;
    `position` counts the tokens before this one. Returns fp32 logits [V]. Equal to the layers run one by one, with
    sums in another order. The weights are looked at now: build a new step when they change.

    Raises HardwareError where `why_not` has a reason.
    """
    matrices: list[Any] = [classifier]
    for layer in layers:
        matrices += [layer.out, layer.gate, layer.up, layer.down]
        for memory in (layer.short_term, layer.long_term):
            matrices += [memory.key, memory.value, memory.gate, memory.decay]
    reason = why_not(matrices)
    if reason:
        raise HardwareError(f"mosaic_step cannot run: {reason}")
    return Step(layers, norm, classifier, heads, eps)

"""Tokens through a whole Memory Mosaic in one call: one of each of a few rows, at the speed of memory, or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmcore.errors import HardwareError
from mmcore.kernels import dispatch
from mmcore.kernels.mosaic_step.cpu import Step
from mmcore.kernels.mosaic_step.graphed import GraphedStep


class Matrix(NamedTuple):
    """A weight matrix [out, in], fp32 or bf16; or int8 with the fp32 scale of each row, [out]."""

    weight: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class MemoryWeights:
    """One kind of memory of one layer. Matrices [d, d], [d, d], [H, d], [H, d]; the rest [H]: gamma, alpha_psi, beta_0,
    beta_1 and alpha as values. `window` and `delay` limit what is read, as in memory_read."""

    key: Matrix
    value: Matrix
    gate: Matrix
    decay: Matrix
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
    out: Matrix
    persistent_norm: Tensor
    gate: Matrix
    up: Matrix
    down: Matrix


def why_not(layers: Sequence[LayerWeights], classifier: Matrix) -> str | None:
    """The reason why these weights cannot take the compiled step, or None."""
    matrices = _matrices(layers, classifier)
    dtypes = {matrix.weight.dtype for matrix in matrices}
    if len(dtypes) != 1:
        return f"the weights are {sorted(map(str, dtypes))}, and the step reads all of one type"
    if classifier.weight.is_cuda:
        reason = dispatch.refusal("triton", classifier.weight.device)
        if reason is None:
            from mmcore.kernels.mosaic_step import triton

            reason = triton.why_not(matrices)
        return reason
    if not dtypes <= {torch.float32, torch.bfloat16, torch.int8}:
        return f"the weights are {dtypes.pop()}, and the step reads fp32, bf16 or int8"
    if not all(matrix.weight.is_cpu and matrix.weight.is_contiguous() for matrix in matrices):
        return "the weights are not contiguous CPU tensors"
    return dispatch.refusal("cpu", classifier.weight.device)


def _matrices(layers: Sequence[LayerWeights], classifier: Matrix) -> list[Matrix]:
    found = [classifier]
    for layer in layers:
        found += [layer.out, layer.gate, layer.up, layer.down]
        for memory in (layer.short_term, layer.long_term):
            found += [memory.key, memory.value, memory.gate, memory.decay]
    return found


def mosaic_step(
    layers: Sequence[LayerWeights], norm: Tensor, classifier: Matrix, heads: int, eps: float, embedding: Tensor | None = None
) -> Step | GraphedStep:
    """Prepare the compiled step: a function `step(x, memories, position, padding, last_only) -> logits`.

    x is the tokens' embeddings [B, T, d], of any number of rows; on a CPU fp32 and of any number of tokens (`pieces`), on a
    GPU of one. Where the step `takes_ids`, which a CPU's does that is given the `embedding` [V, d] in fp32 or bf16, one
    token's x may be ids, int64 [B, 1]; it raises IndexError for one that is none. `memories` are the states of the layers'
    memories, short-term and long-term in turn, which have `scan`, `pending_key`, `pending_raw` and `store`, on a CPU `begin`
    too (mmcore.model.state), and go on by these tokens; `position` counts the tokens before them; `padding`, int64 [B] or
    None, those that fill each row on the left. Returns fp32 logits [B, V] after the last token, or without `last_only`
    [B, T, V]. Equal to the layers run one by one, with sums in another order. The weights are looked at now: build a new
    step when they change. A step belongs to one state; a CPU's makes one for another (`for_another_state()`).

    Raises HardwareError where `why_not` has a reason.
    """
    reason = why_not(layers, classifier)
    if reason:
        raise HardwareError(f"mosaic_step cannot run: {reason}")
    if not classifier.weight.is_cuda:
        return Step(layers, norm, classifier, heads, eps, embedding)
    from mmcore.kernels.mosaic_step import triton

    return GraphedStep(triton.Step(layers, norm, classifier, heads, eps))

"""The language-model loss from hidden states, without the tokens x vocabulary matrix of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels import dispatch
from mmcore.kernels.linear.cpu import rounding
from mmcore.kernels.linear_cross_entropy import blocked, cpu, reference
from mmcore.kernels.linear_cross_entropy.blocked import IGNORED, check_labels


def _triton(*arguments):
    """Imported with its first use: Triton takes half a second."""
    from mmcore.kernels.linear_cross_entropy import triton

    return triton.linear_cross_entropy(*arguments)


_TABLE = {
    "cpu": cpu.linear_cross_entropy,
    "triton": _triton,
    "blocked": blocked.linear_cross_entropy,
    "reference": reference.linear_cross_entropy,
}
_REDUCTIONS = ("mean", "sum", "none")

# From this share of ignored labels on, the rows that count are gathered first. Conversations have half of their
# words ignored and pay for the other half only; packed text ignores one label a document and is not worth a copy.
_WORTH_GATHERING = 1 / 8


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, reduction: str = "mean", implementation: str = "auto"
) -> Tensor:
    """Cross entropy of `softmax(hidden @ weight.T)` against `labels`: -log p(labels[n]), n = 0..N-1.

    hidden [N, d] and weight [V, d] are floating point, labels int64 [N] with -100 for rows that do not count.
    Returns the loss in nats, fp32 (fp64 for fp64 inputs): a scalar for "sum" and "mean" (over the rows that count;
    0 where none does), [N] for "none" (0 in rows that do not count). Differentiable in hidden and weight. Logits
    exist for a few hundred rows at a time; their log-sum-exp is taken in fp32 whatever the input's dtype. Under
    autocast the products are taken in its dtype.

    "sum" and "mean" compute their gradients in the forward pass, while a chunk's logits are at hand, and scale them
    by the upstream scalar in the backward pass: three matrix products, where recomputing the logits takes four. "none"
    recomputes. Raises ValueError for shapes, labels or a reduction that make no sense; a label outside the vocabulary is
    reported by a GPU itself, later, or has the loss NaN there.
    """
    _check(hidden, weight, labels, reduction)
    function = dispatch.choose("linear_cross_entropy", _TABLE, implementation, hidden.device)
    if function is reference.linear_cross_entropy:
        if not torch.compiler.is_compiling():  # a compiled gather finds bad labels itself
            check_labels(labels, len(weight))
        return function(hidden, weight, labels, reduction)
    kind = hidden.device.type
    if function is cpu.linear_cross_entropy and rounding() and hidden.dtype != torch.float64:
        function = cpu.rounded
    elif torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    with torch.autocast(kind, enabled=False):
        # On a GPU the count would make the host wait, and a traced graph cannot hold a shape that hangs on it.
        if kind == "cpu" and not torch.compiler.is_compiling():
            kept = labels != IGNORED
            if int(kept.sum()) < (1 - _WORTH_GATHERING) * labels.numel():
                rows = kept.nonzero().squeeze(1)
                losses = function(hidden.index_select(0, rows), weight, labels[rows], reduction)
                return losses if reduction != "none" else losses.new_zeros(labels.shape).index_copy(0, rows, losses)
        return function(hidden, weight, labels, reduction)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}: choose one of {', '.join(_REDUCTIONS)}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: hidden is {list(hidden.shape)} and weight {list(weight.shape)}: "
            f"they must be [N, d] and [V, d]"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: labels are {labels.dtype} {list(labels.shape)}: they must be int64 [{len(hidden)}]"
        )

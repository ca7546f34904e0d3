"""The chunked loss with its row operation in Triton, on logits as the product left them (16 bits or fp32).

PyTorch's row operation widens a chunk of logits to fp32, walks it four times and narrows the gradient again. Here a
program reads its row twice (the second time mostly from the cache) and writes the gradient over it: of the bytes that
a chunk moves, 128,256 words wide, what is left beside the products is about a sixth. The products are the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.kernels import tuning
from mmcore.kernels.linear_cross_entropy import blocked
from mmcore.kernels.linear_cross_entropy.blocked import IGNORED

WIDTH = 64 if tuning.INTERPRETED else 8192  # numbers of a row held at once


@triton.jit
def _softmax_kernel(
    logits, labels, losses, words, step, ignored, GRADIENT: tl.constexpr, WIDTH: tl.constexpr
):
    """The loss of one row, and its logits turned into softmax - onehot: 0 where the label does not count, NaN where it is
    no word."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * step
    label = tl.load(labels + row)
    counts = label != ignored
    columns = tl.arange(0, WIDTH)
    known = (label >= 0) & (label < words)
    own = tl.load(logits + label, mask=known, other=0.0).to(tl.float32)
    top = float("-inf")
    total = 0.0
    for begin in range(0, words, WIDTH):
        inside = begin + columns < words
        x = tl.load(logits + begin + columns, mask=inside, other=float("-inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), 0)
        top = new_top
    level = tl.where(known, top + tl.log(total), float("nan"))
    tl.store(losses + row, tl.where(counts, level - own, 0.0))
    if GRADIENT:
        for begin in range(0, words, WIDTH):
            inside = begin + columns < words
            x = tl.load(logits + begin + columns, mask=inside, other=float("-inf")).to(tl.float32)
            share = tl.exp(x - level) - tl.where(begin + columns == label, 1.0, 0.0)
            share = tl.where(counts, share, 0.0)
            tl.store(logits + begin + columns, share.to(logits.dtype.element_ty), mask=inside)


# One configuration: trying several would run them on logits that the first has overwritten.
_SOFTMAX = tuning.Tuned(_softmax_kernel, [triton.Config({"WIDTH": WIDTH}, num_warps=16, num_stages=1)], ())


def _step(logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        _SOFTMAX(
            (len(logits),), logits, labels.contiguous(), losses, logits.shape[1], logits.stride(0), IGNORED,
            on=logits, GRADIENT=with_gradient,
        )  # fmt: skip
    return losses


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """As in `mmcore.kernels.linear_cross_entropy`; fp64 takes the PyTorch row operation."""
    step = "blocked" if hidden.dtype == torch.float64 else "triton"
    return blocked.apply(hidden, weight, labels, reduction, step)


blocked.STEPS["triton"] = _step
blocked.TAKE_HALF.add("triton")

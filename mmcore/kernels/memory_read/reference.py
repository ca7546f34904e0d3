"""The definition of memory_read, with a Tq x Tk matrix of scores in plain differentiable PyTorch.

Shape suffixes: B batch, Q queries, K pairs, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels.dispatch import autocasting


def intervals(
    starts: Tensor | None,
    window: int | None,
    delay: int,
    offset: int,
    shape: tuple[int, int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The first and last pair that each query reads, int64 [B, Q]; the memory is empty where first > last.

    `shape` is (B, Tq, Tk). With `starts` None the result is [1, Q], to be broadcast.
    """
    _, queries, pairs = shape
    position_1Q = torch.arange(offset, offset + queries, device=device).unsqueeze(0)
    last_1Q = (position_1Q - delay).clamp(max=pairs - 1)
    first_1Q = (position_1Q - window + 1).clamp(min=0) if window else torch.zeros_like(position_1Q)
    if starts is None:
        return first_1Q, last_1Q
    first_BQ = torch.maximum(first_1Q, starts.to(first_1Q.dtype))
    return first_BQ, last_1Q.expand_as(first_BQ)


def bandwidth(count_BQ: Tensor, base_H: Tensor, slope_H: Tensor, exponent_H: Tensor) -> Tensor:
    """beta = slope * n ** exponent + base, [B, Q, H] (equation 6); n = 0, which is never used, counts as 1."""
    count_BQ1 = count_BQ.clamp(min=1).unsqueeze(-1).to(slope_H.dtype)
    return slope_H * count_BQ1**exponent_H + base_H


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums: fp64 for fp64 tensors, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_read(queries, keys, values, base, slope, exponent, starts, window, delay, offset) -> Tensor:
    """See mmcore.kernels.memory_read.memory_read."""
    batch, length, _, _ = queries.shape
    # Autocast would round the scores, whose errors a bandwidth multiplies. It leaves fp64 alone, in the backward pass too.
    dtype = torch.float64 if autocasting(queries.device.type) else wide(queries.dtype)
    shape = (batch, length, keys.shape[1])
    first_BQ, last_BQ = intervals(starts, window, delay, offset, shape, queries.device)
    beta_BQH = bandwidth(last_BQ - first_BQ + 1, base.to(dtype), slope.to(dtype), exponent.to(dtype))

    pair_K = torch.arange(keys.shape[1], device=queries.device)
    closed_BQK = (pair_K < first_BQ.unsqueeze(-1)) | (pair_K > last_BQ.unsqueeze(-1))
    closed_B1QK = closed_BQK.unsqueeze(1)
    scores_BHQK = torch.einsum("bqhd,bkhd->bhqk", queries.to(dtype) * beta_BQH.unsqueeze(-1), keys.to(dtype))
    # The lowest finite number, not -inf, whose softmax over an empty row is NaN; what an empty row then gets
    # is set to zero after the softmax, which also stops its gradient.
    scores_BHQK = scores_BHQK.masked_fill(closed_B1QK, torch.finfo(dtype).min)
    weights_BHQK = scores_BHQK.softmax(-1).masked_fill(closed_B1QK, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights_BHQK, values.to(dtype)).to(queries.dtype)

"""memory_read as blocks of queries, each with the pairs that the block can read, on any device and dtype.

A block is one scaled_dot_product_attention with a small boolean mask. Autograd over such blocks would keep
every mask (together Tq x Tk) until the backward pass; the function here keeps only its inputs and computes each
block again, so that memory stays linear in T for one forward more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.kernels.memory_read.reference import bandwidth, intervals, wide

BLOCK = 256  # queries; 128 and 512 were 5 to 20 % slower at T = 4096, D = 64 on two CPU cores


def _reach(block: slice, window: int | None, delay: int, offset: int, pairs: int) -> slice:
    """The pairs that any query of the block can read, without looking into `starts` (no wait for a GPU)."""
    first = max(0, offset + block.start - window + 1) if window else 0
    last = min(pairs - 1, offset + block.stop - 1 - delay)
    return slice(first, max(first, last + 1))


def _read_block(queries, keys, values, base, slope, exponent, first_BQ, last_BQ, origin: int) -> Tensor:
    """One block; `keys` and `values` are the pairs from number `origin` on."""
    dtype = wide(queries.dtype)
    beta_BQH = bandwidth(last_BQ - first_BQ + 1, base.to(dtype), slope.to(dtype), exponent.to(dtype))
    scaled = (queries.to(dtype) * beta_BQH.unsqueeze(-1)).transpose(1, 2)
    pair_K = torch.arange(origin, origin + keys.shape[1], device=keys.device)
    open_BQK = (pair_K >= first_BQ.unsqueeze(-1)) & (pair_K <= last_BQ.unsqueeze(-1))
    # What a row without any open pair gives differs between SDPA's backends (0, NaN, the mean). Such a row reads
    # everything here, and the fill below makes it, and its gradient, exactly zero.
    empty_BQ1 = (first_BQ > last_BQ).unsqueeze(-1)
    mask = (open_BQK | empty_BQ1).unsqueeze(1)
    read = F.scaled_dot_product_attention(
        scaled, keys.to(dtype).transpose(1, 2), values.to(dtype).transpose(1, 2), attn_mask=mask, scale=1.0
    )
    return read.transpose(1, 2).masked_fill(empty_BQ1.unsqueeze(-1), 0.0).to(queries.dtype)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, values, base, slope, exponent, starts, window, delay, offset):
        ctx.save_for_backward(queries, keys, values, base, slope, exponent)
        ctx.starts, ctx.place = starts, (window, delay, offset)
        out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
        for block, reach, first, last in _blocks(queries, keys, starts, *ctx.place):
            out[:, block] = _read_block(
                queries[:, block], keys[:, reach], values[:, reach], base, slope, exponent, first, last, reach.start
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        queries, keys, values, *bandwidths = ctx.saved_tensors
        inputs = (queries, keys, values, *bandwidths)
        sums = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in inputs]
        for block, reach, first, last in _blocks(queries, keys, ctx.starts, *ctx.place):
            parts = [queries[:, block], keys[:, reach], values[:, reach], *bandwidths]
            leaves = [part.detach().requires_grad_() for part in parts]
            with torch.enable_grad():
                out = _read_block(*leaves, first, last, reach.start)
            grads = torch.autograd.grad(out, leaves, grad[:, block])
            totals = (sums[0][:, block], sums[1][:, reach], sums[2][:, reach], *sums[3:])
            for total, part in zip(totals, grads, strict=True):
                total += part
        needed = (total if need else None for total, need in zip(sums, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None, None


def _blocks(queries, keys, starts, window, delay, offset):
    """Yields (queries of the block, pairs within its reach, first [B, Q], last [B, Q]); unread blocks are left out."""
    batch, length = queries.shape[:2]
    pairs = keys.shape[1]
    first_BQ, last_BQ = intervals(starts, window, delay, offset, (batch, length, pairs), queries.device)
    for begin in range(0, length, BLOCK):
        block = slice(begin, min(begin + BLOCK, length))
        reach = _reach(block, window, delay, offset, pairs)
        if reach.stop > reach.start:
            yield block, reach, first_BQ[:, block], last_BQ[:, block]


def memory_read(queries, keys, values, base, slope, exponent, starts, window, delay, offset) -> Tensor:
    """See mmcore.kernels.memory_read.memory_read."""
    return _Read.apply(queries, keys, values, base, slope, exponent, starts, window, delay, offset)

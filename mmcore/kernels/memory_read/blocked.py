"""memory_read as blocks of queries, each with the pairs that the block can read, on any device and dtype.

A block is one scaled_dot_product_attention with a small boolean mask. The operator keeps its inputs and its result, and
the backward pass computes the weights of each block again, for as many rows of the batch at a time as make SCORES
scores, so that memory stays linear in T.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels import registry
from mmcore.kernels.memory_read.reference import bandwidth, intervals, wide

BLOCK = 256  # queries; 128 and 512 were 5 to 20 % slower at T = 4096, D = 64 on two CPU cores
SCORES = 2**24


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


def _exact(form: Callable) -> Callable:
    """`form` without autocast, which would round scores, whose errors a bandwidth multiplies. It may be on in the backward
    pass as well."""

    @functools.wraps(form)
    def run(first, *others):
        with torch.autocast(first.device.type, enabled=False):
            return form(first, *others)

    return run


@_exact
def _run(queries, keys, values, base, slope, exponent, starts, window, delay, offset):
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    for block, reach, first, last in _blocks(queries, keys, starts, window, delay, offset):
        out[:, block] = _read_block(
            queries[:, block], keys[:, reach], values[:, reach], base, slope, exponent, first, last, reach.start
        )
    return out


def _fake(queries, keys, values, base, slope, exponent, starts, window, delay, offset):
    return queries.new_empty(queries.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output)
    ctx.place = inputs[7:]


def _gradients(ctx, grad):
    *inputs, out = ctx.saved_tensors
    return *_read_backward(grad, *inputs, *ctx.place, out), None, None, None, None


@_exact
def _run_backward(grad, queries, keys, values, base, slope, exponent, starts, window, delay, offset, out):
    dtype = wide(queries.dtype)
    inputs = (queries, keys, values, base, slope, exponent)
    sums = [torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in inputs]
    scalars = tuple(t.to(dtype) for t in (base, slope, exponent))
    for block, reach, first, last in _blocks(queries, keys, starts, window, delay, offset):
        rows = max(1, SCORES // (queries.shape[2] * (block.stop - block.start) * (reach.stop - reach.start)))
        for begin in range(0, queries.shape[0], rows):
            row = slice(begin, begin + rows)
            parts = (t[row].to(dtype) for t in (
                queries[:, block], keys[:, reach], values[:, reach], grad[:, block], out[:, block]
            ))  # fmt: skip
            ends = (t if t.shape[0] == 1 else t[row] for t in (first, last))
            grads = _block_gradients(*parts, *scalars, *ends, reach.start)
            totals = (sums[0][row, block], sums[1][row, reach], sums[2][row, reach], *sums[3:])
            for total, part in zip(totals, grads, strict=True):
                total += part
    return tuple(total.to(t.dtype) for total, t in zip(sums, inputs, strict=True))


def _block_gradients(queries, keys, values, grad, out, base_H, slope_H, exponent_H, first_BQ, last_BQ, origin: int):
    """Gradients of one block for its six inputs: with weights w and w' = grad . v, ds = w (w' - grad . out) is the
    gradient of the scores s = beta q . k, and that of beta is sum ds q . k = q . (sum ds k)."""
    count_BQ = last_BQ - first_BQ + 1
    beta_BQH1 = bandwidth(count_BQ, base_H, slope_H, exponent_H).unsqueeze(-1)
    q_BHQD, k_BHKD, v_BHKD, grad_BHQD = (t.transpose(1, 2) for t in (queries * beta_BQH1, keys, values, grad))
    pair_K = torch.arange(origin, origin + keys.shape[1], device=keys.device)
    closed_B1QK = ((pair_K < first_BQ.unsqueeze(-1)) | (pair_K > last_BQ.unsqueeze(-1))).unsqueeze(1)
    scores = (q_BHQD @ k_BHKD.transpose(-1, -2)).masked_fill_(closed_B1QK, torch.finfo(queries.dtype).min)
    weights = scores.softmax(-1).masked_fill_(closed_B1QK, 0.0)
    along_BHQ1 = (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    grad_scores = (grad_BHQD @ v_BHKD.transpose(-1, -2)).sub_(along_BHQ1).mul_(weights)
    grad_values = (weights.transpose(-1, -2) @ grad_BHQD).transpose(1, 2)
    grad_keys = (grad_scores.transpose(-1, -2) @ q_BHQD).transpose(1, 2)
    grad_scaled = (grad_scores @ k_BHKD).transpose(1, 2)
    grad_beta = (grad_scaled * queries).sum(-1)
    count_BQ1 = count_BQ.clamp(min=1).unsqueeze(-1).to(slope_H.dtype)
    power = count_BQ1**exponent_H
    grad_exponent = grad_beta * slope_H * power * count_BQ1.log()
    bandwidths = (t.sum((0, 1)) for t in (grad_beta, grad_beta * power, grad_exponent))
    return grad_scaled * beta_BQH1, grad_keys, grad_values, *bandwidths


def _fake_backward(grad, queries, keys, values, base, slope, exponent, starts, window, delay, offset, out):
    return tuple(t.new_empty(t.shape) for t in (queries, keys, values, base, slope, exponent))


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
    return _read(queries, keys, values, base, slope, exponent, starts, window, delay, offset)


_read = registry.operator(
    "memory_read_blocked(Tensor queries, Tensor keys, Tensor values, Tensor base, Tensor slope, Tensor exponent, "
    "Tensor? starts, int? window, SymInt delay, SymInt offset) -> Tensor",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_read_backward = registry.operator(
    "memory_read_blocked_backward(Tensor grad, Tensor queries, Tensor keys, Tensor values, Tensor base, Tensor slope, "
    "Tensor exponent, Tensor? starts, int? window, SymInt delay, SymInt offset, Tensor out)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip

"""A few queries over a long memory (decoding), without gradients: the pairs are shared out over the card.

One query reads every pair once, and what limits it is the reading. So each head's pairs are cut into shares, one
program each; a second kernel joins the shares' sums. Where the queries' place is a tensor on the device, nothing of the
call depends on how far the text has come, and a CUDA graph of it stays right: each program finds its share itself.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.kernels import tuning
from mmcore.kernels.memory_read.triton_parts import (
    LOG2E,
    MOVING,
    constants,
    count_power,
    interval,
    load_rows,
    plain,
    spans,
    store_rows,
)  # fmt: skip

FEW = 16  # as many rows as a product on tensor cores has at least


@triton.jit
def read_pairs(
    q, scale, first, last, keys, values, key_step, value_step, begin, end, limit, size,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
):
    """What M queries read of the pairs begin <= j < end, as far as first <= j <= last: the weighted sum, the weights' sum,
    the greatest score (in log2). `scale` is beta log2(e)."""
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    for n in range(begin, end, N):
        numbers = n + tl.arange(0, N)
        k = load_rows(keys, numbers, key_step, limit, size, D, EVEN)
        v = load_rows(values, numbers, value_step, limit, size, D, EVEN)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        open_ = (numbers[None, :] >= first[:, None]) & (numbers[None, :] <= last[:, None])
        scores = tl.where(open_, products * scale[:, None], float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def join_shares(sums, totals, tops, shares, step, size, D: tl.constexpr, S: tl.constexpr):
    """[D], the quotient of the sums of one query's shares, which lie `step` apart; 0 where nothing was read. At most 32 of
    them lie in registers at a time."""
    columns = tl.arange(0, D)
    numbers = tl.arange(0, S)
    top = tl.load(tops + numbers * step, mask=numbers < shares, other=float("-inf"))
    greatest = tl.max(top, 0)
    finite = tl.where(greatest == float("-inf"), 0.0, greatest)
    total = tl.sum(tl.load(totals + numbers * step, mask=numbers < shares, other=0.0) * tl.exp2(top - finite), 0)
    R: tl.constexpr = min(S, 32)
    result = tl.zeros([D], tl.float32)
    for r in tl.static_range(0, S, R):
        numbers = r + tl.arange(0, R)
        present = numbers < shares
        weight = tl.exp2(tl.load(tops + numbers * step, mask=present, other=float("-inf")) - finite)
        inside = present[:, None] & (columns < size)[None, :]
        parts = tl.load(sums + (numbers * step)[:, None] * size + columns[None, :], mask=inside, other=0.0)
        result += tl.sum(parts * weight[:, None], 0)
    return result / tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=MOVING)
def _share_kernel(
    queries, keys, values, base, slope, exponent, starts, sums, totals, tops, count, pairs, heads, size,
    query_row, query_step, query_head, key_row, key_step, key_head, value_row, value_step, value_head,
    window, delay, offset, LENGTH, STARTS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):
    """One share of what M queries of a head read: the weighted sum, the weights' sum, the greatest score (in log2)."""
    share = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = tl.arange(0, M)
    first, last = interval(starts + b * count, rows, offset, count, pairs, window, delay, STARTS, WINDOW)
    power, _ = count_power(first, last, tl.load(exponent + h))
    scale = (tl.load(slope + h) * power + tl.load(base + h)) * LOG2E
    q = load_rows(queries + b * query_row + h * query_head, rows, query_step, count, size, D, EVEN)
    keys += b * key_row + h * key_head
    values += b * value_row + h * value_head
    begin, _, _, end = spans(first, last, rows < count, N)
    each = tl.cdiv(tl.cdiv(end - begin, N), tl.num_programs(0)) * N
    begin += share * each
    acc, total, top = read_pairs(
        q, scale, first, last, keys, values, key_step, value_step, begin, tl.minimum(begin + each, end), end, size,
        PRECISION, M, N, D, EVEN,
    )
    at = (row * tl.num_programs(0) + share).to(tl.int64) * count
    store_rows(sums + at * size, acc, rows, size, count, size, D)
    tl.store(totals + at + rows, total, mask=rows < count)
    tl.store(tops + at + rows, top, mask=rows < count)


@triton.jit
def _join_kernel(
    sums, totals, tops, out, count, heads, size, shares, D: tl.constexpr, S: tl.constexpr,
):
    """out of one query of one head from its shares."""
    query = tl.program_id(0)
    row = tl.program_id(1)
    at = row.to(tl.int64) * shares * count + query
    columns = tl.arange(0, D)
    read = join_shares(sums + at * size, totals + at, tops + at, shares, count, size, D, S)
    b, h = (row // heads).to(tl.int64), row % heads
    target = out + ((b * count + query) * heads + h) * size
    tl.store(target + columns, read.to(out.dtype.element_ty), mask=columns < size)


@functools.cache
def _sharer(row: int) -> tuning.Tuned:
    """The kernel for keys of `row` bytes; wide ones leave shared memory for fewer."""
    if tuning.INTERPRETED:
        choices = [(16, 4, 1)]
    else:
        choices = [(64, 4, 4), (128, 4, 3), (32, 2, 5)] if row <= 256 else [(32, 4, 2), (16, 4, 2)]
    configs = [triton.Config({"N": n}, num_warps=warps, num_stages=stages) for n, warps, stages in choices]
    return tuning.Tuned(_share_kernel, configs, ("LENGTH", "WINDOW", "D"))


_JOIN = tuning.Tuned(_join_kernel, [triton.Config({}, num_warps=4, num_stages=1)], ())


def share_count(rows: int, reach: int, on: Tensor, programs: int = 4, least: int = 128) -> int:
    """Into how many shares `reach` pairs of each of `rows` heads are cut: `programs` for each multiprocessor, but none with
    fewer than `least` pairs to read."""
    wanted = triton.cdiv(programs * tuning.processors(on), rows)
    return max(1, min(wanted, triton.cdiv(reach, 16 if tuning.INTERPRETED else least), 128))


def memory_read(queries, keys, values, base, slope, exponent, starts, window, delay, offset) -> Tensor:
    """See mmcore.kernels.memory_read.memory_read, for 1 to FEW queries."""
    queries, keys, values = plain(queries), plain(keys), plain(values)
    batch, count, heads, size = queries.shape
    pairs = keys.shape[1]
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if out.numel() == 0:
        return out
    reach = min(pairs, window + count) if window else pairs
    shares = share_count(batch * heads, reach, queries)
    fp32 = {"dtype": torch.float32, "device": queries.device}
    sums = torch.empty(batch * heads, shares, count, size, **fp32)
    totals, tops = torch.empty(2, batch * heads, shares, count, **fp32)
    settings = constants(queries, starts, window)
    _sharer(settings["D"] * queries.element_size())(
        (shares, batch * heads), queries, keys, values, base, slope, exponent, queries if starts is None else starts,
        sums, totals, tops, count, pairs, heads, size, *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        window or 0, delay, offset, tuning.bucket(reach), on=queries, M=FEW, **settings,
    )  # fmt: skip
    _JOIN(
        (count, batch * heads), sums, totals, tops, out, count, heads, size, shares, on=queries, D=settings["D"],
        S=triton.next_power_of_2(shares),
    )  # fmt: skip
    return out

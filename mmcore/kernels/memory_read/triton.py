"""memory_read in Triton: kernel regression in blocks, as FlashAttention reads (arXiv 2307.08691), never Tq x Tk.

Shapes: queries q, keys k, values v [., ., H, D]; a program holds R rows of one head. What is peculiar to memories:

- The bandwidth beta of a query follows from its place alone. It multiplies the products q.k in fp32: in the queries it
  would be rounded with them, and an error of 2^-9 of beta lies in the exponent.
- Window, delay and documents give every query an interval of pairs. Blocks outside the intervals of all rows are not
  visited, blocks inside all of them take no mask.
- Where the queries are the keys (training), a program of the backward pass holds rows that are both: it gathers what
  they receive as keys from later queries, then as queries from earlier keys, and writes one gradient. Its work is the
  same wherever its rows lie. No atomics: every sum has one order, and equal inputs give equal bits.
- The gradient of beta is sum_j ds_ij q_i.k_j = q_i . (sum_j ds_ij k_j), whose bracket is the gradient of the query
  before its factor beta: a row sum at the end. Each block of rows writes three partial sums for the three parameters.

A few queries (decoding) are read by `triton_few.py`. Bandwidths are taken to be at least 0, as the model makes them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import registry, tuning
from mmcore.kernels.memory_read import triton_few
from mmcore.kernels.memory_read.triton_backward import run_backward
from mmcore.kernels.memory_read.triton_parts import (
    LOG2E,
    MOVING,
    configs,
    constants,
    count_power,
    interval,
    load_rows,
    plain,
    spans,
    store_rows,
)  # fmt: skip


@triton.jit
def _read_span(
    acc, total, top, q, scale, first, last, keys, values, key_step, value_step, begin, end, limit, size,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
):
    """Read the pairs begin <= j < end, N at a time: the running sum, its weight, its greatest score."""
    for n in range(begin, end, N):
        pairs = n + tl.arange(0, N)
        k = load_rows(keys, pairs, key_step, limit, size, D, EVEN)
        v = load_rows(values, pairs, value_step, limit, size, D, EVEN)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            open_ = (pairs[None, :] >= first[:, None]) & (pairs[None, :] <= last[:, None])
            scores = tl.where(open_, products * scale[:, None], float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp2(scores - finite[:, None])
        else:
            new_top = tl.maximum(top, tl.max(products, 1) * scale)
            finite = new_top
            weights = tl.exp2(products * scale[:, None] - new_top[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=MOVING)
def _forward_kernel(
    queries, keys, values, base, slope, exponent, starts, out, statistics, count, pairs, heads, size,
    query_row, query_step, query_head, key_row, key_step, key_head, value_row, value_step, value_head,
    window, delay, offset, LENGTH, STARTS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):
    """Read for M queries of a head. statistics: log2 of the sum of weights, +inf for a query that reads nothing."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest intervals first
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = block * M + tl.arange(0, M)
    first, last = interval(starts + b * count, rows, offset, count, pairs, window, delay, STARTS, WINDOW)
    power, _ = count_power(first, last, tl.load(exponent + h))
    scale = (tl.load(slope + h) * power + tl.load(base + h)) * LOG2E
    q = load_rows(queries + b * query_row + h * query_head, rows, query_step, count, size, D, EVEN)
    keys += b * key_row + h * key_head
    values += b * value_row + h * value_head
    acc = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    begin, full, full_end, end = spans(first, last, rows < count, N)
    if WINDOW:  # short: hardly a block of it is open to all
        acc, total, top = _read_span(
            acc, total, top, q, scale, first, last, keys, values, key_step, value_step, begin, end, end, size,
            True, PRECISION, N, D, EVEN,
        )
    else:
        if STARTS:
            acc, total, top = _read_span(
                acc, total, top, q, scale, first, last, keys, values, key_step, value_step, begin, full, end, size,
                True, PRECISION, N, D, EVEN,
            )
        acc, total, top = _read_span(
            acc, total, top, q, scale, first, last, keys, values, key_step, value_step, full, full_end, pairs, size,
            False, PRECISION, N, D, EVEN,
        )
        acc, total, top = _read_span(
            acc, total, top, q, scale, first, last, keys, values, key_step, value_step, full_end, end, end, size,
            True, PRECISION, N, D, EVEN,
        )
    empty = first > last
    acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    store_rows(out + (b * count * heads + h) * size, acc, rows, heads * size, count, size, D)
    log_total = tl.where(empty, float("inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(statistics + row.to(tl.int64) * count + rows, log_total, mask=rows < count)


@functools.cache
def _reader(width: int, narrow: bool) -> tuning.Tuned:
    """The forward kernel for heads of up to `width`; `narrow` for 16-bit numbers."""
    if tuning.INTERPRETED:
        table = "32 16 4 1"
    elif not narrow:
        table = "64 32 4 2\n128 32 8 2" if width <= 128 else "32 32 4 2"
    elif width <= 64:
        table = "128 64 4 3\n128 128 8 3\n64 64 4 3"
    elif width <= 128:
        table = "64 64 4 3\n128 128 8 3\n128 64 8 3"
    else:
        table = "128 32 8 2\n64 64 4 2"
    return tuning.Tuned(_forward_kernel, configs("M N", table), ("LENGTH", "WINDOW", "STARTS"))


def _run(keys, values, base, slope, exponent, queries, starts, window, delay, offset):
    keys, values = plain(keys), plain(values)
    queries = keys if queries is None else plain(queries)
    batch, count, heads, size = queries.shape
    pairs = keys.shape[1]
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    statistics = torch.empty(batch, heads, count, dtype=torch.float32, device=queries.device)
    if out.numel() == 0:
        return out, statistics
    settings = constants(queries, starts, window)
    _reader(settings["D"], queries.element_size() == 2)(
        lambda meta: (triton.cdiv(count, meta["M"]), batch * heads),
        queries, keys, values, base, slope, exponent, queries if starts is None else starts, out, statistics,
        count, pairs, heads, size, *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        window or 0, delay, offset, tuning.bucket(pairs), on=queries, **settings,
    )  # fmt: skip
    return out, statistics


def _fake(keys, values, base, slope, exponent, queries, starts, window, delay, offset):
    queries = keys if queries is None else queries
    batch, count, heads, _ = queries.shape
    return queries.new_empty(queries.shape), queries.new_empty(batch, heads, count, dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.place = inputs[7:]


def _gradients(ctx, grad, _):
    *inputs, out, statistics = ctx.saved_tensors
    wanted = any(ctx.needs_input_grad[2:5])
    *grads, bandwidths, grad_queries = _read_backward(grad, *inputs, *ctx.place, out, statistics, wanted)
    bandwidths = bandwidths.unbind() if wanted else (None, None, None)
    return *grads, *bandwidths, None if inputs[5] is None else grad_queries, None, None, None, None


def _fake_backward(
    grad, keys, values, base, slope, exponent, queries, starts, window, delay, offset, out, statistics, bandwidths
):
    shapes = (keys.shape, values.shape, (3 if bandwidths else 0, *base.shape), (0,) if queries is None else queries.shape)
    dtypes = (keys.dtype, keys.dtype, torch.float32, keys.dtype)
    return tuple(keys.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


_read = registry.operator(
    "memory_read_triton(Tensor keys, Tensor values, Tensor base, Tensor slope, Tensor exponent, Tensor? queries, "
    "Tensor? starts, int? window, SymInt delay, SymInt offset) -> (Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_read_backward = registry.operator(
    "memory_read_triton_backward(Tensor grad, Tensor keys, Tensor values, Tensor base, Tensor slope, Tensor exponent, "
    "Tensor? queries, Tensor? starts, int? window, SymInt delay, SymInt offset, Tensor out, Tensor statistics, "
    "bool bandwidths) -> (Tensor, Tensor, Tensor, Tensor)",
    run_backward, _fake_backward,
)  # fmt: skip


def memory_read(queries, keys, values, base, slope, exponent, starts, window, delay, offset) -> Tensor:
    """See mmcore.kernels.memory_read.memory_read. Raises ConfigError for fp64, which would be rounded."""
    if queries.dtype is torch.float64:
        raise ConfigError("memory_read computes in fp32 as 'triton': use implementation='blocked' for fp64")
    bandwidths = [t.float().contiguous() for t in (base, slope, exponent)]
    if starts is not None:
        starts = starts.to(torch.int32).contiguous()
    if registry.direct(queries) and 0 < queries.shape[1] <= triton_few.FEW:
        return triton_few.memory_read(queries, keys, values, *bandwidths, starts, window, delay, offset)
    read = _run if registry.direct(queries) else _read
    return read(keys, values, *bandwidths, None if queries is keys else queries, starts, window, delay, offset)[0]

"""The backward pass of memory_read in Triton; see triton.py for what is peculiar to it."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mmcore.kernels import tuning
from mmcore.kernels.memory_read.triton_parts import (
    LOG2E,
    MOVING,
    configs,
    constants,
    count_power,
    interval,
    load_rows,
    load_rows_at,
    plain,
    rows_at,
    spans,
    store_rows,
)  # fmt: skip

EXTENT = 32 if tuning.INTERPRETED else 128
"""Queries whose least and greatest start are kept together, for the backward pass to skip by. A multiple of QB."""


@triton.jit(do_not_specialize=MOVING)
def _prepare_kernel(
    grad, out, starts, base, slope, exponent, along, scales, extents, count, pairs, heads, size,
    grad_row, grad_step, grad_head, window, delay, offset,
    STARTS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, E: tl.constexpr,
):
    """Of E queries: along = grad . out, scales = beta log2(e), and (least, greatest) of their starts.

    Computed again for each block of pairs, powers were half of the instructions of the backward pass.
    """
    block = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = block * E + tl.arange(0, E)
    upstream = load_rows(grad + b * grad_row + h * grad_head, rows, grad_step, count, size, D, EVEN).to(tl.float32)
    read = load_rows(out + (b * count * heads + h) * size, rows, heads * size, count, size, D, EVEN).to(tl.float32)
    tl.store(along + row.to(tl.int64) * count + rows, tl.sum(upstream * read, 1), mask=rows < count)
    first, last = interval(starts + b * count, rows, offset, count, pairs, window, delay, STARTS, WINDOW)
    power, _ = count_power(first, last, tl.load(exponent + h))
    beta = tl.load(slope + h) * power + tl.load(base + h)
    tl.store(scales + row.to(tl.int64) * count + rows, beta * LOG2E, mask=rows < count)
    if STARTS:
        if h == 0:
            start = tl.load(starts + b * count + rows, mask=rows < count, other=2147483647)
            at = extents + (b * tl.num_programs(0) + block) * 2
            tl.store(at, tl.min(start, 0))
            tl.store(at + 1, tl.max(tl.where(rows < count, start, 0), 0))


@triton.jit
def _key_span(
    grad_key, grad_value, k, v, numbers, queries, grad, starts, statistics, along, scales,
    query_step, grad_step, begin, end, count, pairs, size, window, delay, offset,
    MASKED: tl.constexpr, STARTS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    QB: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
):
    """What the pairs `numbers` receive from the queries begin <= i < end, keys log2(e) times too much. Scores are
    transposed: [pairs, queries]."""
    queries_at, grad_at = rows_at(queries, query_step, QB, D), rows_at(grad, grad_step, QB, D)
    for i in range(begin, end, QB):
        rows = i + tl.arange(0, QB)
        q = load_rows_at(queries_at, i, query_step, count, size, QB, D, EVEN)
        upstream = load_rows_at(grad_at, i, grad_step, count, size, QB, D, EVEN)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        # Rows of numbers as late as may be, for their registers; a product before exponentials, which run beside it.
        log_total = tl.load(statistics + rows, mask=rows < count, other=float("inf"))
        scale = tl.load(scales + rows, mask=rows < count, other=0.0)
        grad_weights = tl.dot(v, tl.trans(upstream), input_precision=PRECISION)
        weights = tl.exp2(products * scale[None, :] - log_total[None, :])
        if MASKED:
            first, last = interval(starts, rows, offset, count, pairs, window, delay, STARTS, WINDOW)
            open_ = (numbers[:, None] >= first[None, :]) & (numbers[:, None] <= last[None, :])
            weights = tl.where(open_, weights, 0.0)
        grad_value = tl.dot(weights.to(upstream.dtype), upstream, grad_value, input_precision=PRECISION)
        level = tl.load(along + rows, mask=rows < count, other=0.0) * scale
        grad_scores = weights * (grad_weights * scale[None, :] - level[None, :])
        grad_key = tl.dot(grad_scores.to(q.dtype), q, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit
def _query_span(
    grad_query, sums, q, upstream, scale, log_total, level, first, last, keys, values, key_step, value_step, begin, end,
    limit, size, MASKED: tl.constexpr, PRECISION: tl.constexpr, KB: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
):
    """What a block of queries receives, log2(e) times too much, from the pairs begin <= j < end; and, added to `sums`, what
    each query's w_j q.k_j, ds_j and ds_j q.k_j sum up to, in fp32."""
    keys_at, values_at = rows_at(keys, key_step, KB, D), rows_at(values, value_step, KB, D)
    for n in range(begin, end, KB):
        pairs = n + tl.arange(0, KB)
        k = load_rows_at(keys_at, n, key_step, limit, size, KB, D, EVEN)
        v = load_rows_at(values_at, n, value_step, limit, size, KB, D, EVEN)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.exp2(products * scale[:, None] - log_total[:, None])
        if MASKED:
            open_ = (pairs[None, :] >= first[:, None]) & (pairs[None, :] <= last[:, None])
            weights = tl.where(open_, weights, 0.0)
        grad_weights = tl.dot(upstream, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - level[:, None])
        received = (grad_scores * scale[:, None]).to(k.dtype)
        grad_query = tl.dot(received, k, grad_query, input_precision=PRECISION)
        mean, slip, along = sums
        sums = (mean + tl.sum(weights * products, 1), slip + tl.sum(grad_scores, 1),
                along + tl.sum(grad_scores * products, 1))  # fmt: skip
    return grad_query, sums


@triton.jit(do_not_specialize=MOVING)
def _backward_kernel(
    queries, keys, values, grad, starts, extents, statistics, along, scales,
    grad_queries, grad_keys, grad_values, grad_betas, count, pairs, heads, size,
    query_row, query_step, query_head, key_row, key_step, key_head, value_row, value_step, value_head,
    grad_row, grad_step, grad_head, window, delay, offset, LENGTH,
    AS_KEYS: tl.constexpr, AS_QUERIES: tl.constexpr, STARTS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr, E: tl.constexpr, BLOCKS: tl.constexpr,
    R: tl.constexpr, QB: tl.constexpr, KB: tl.constexpr,
):
    """Gradients of R rows: of keys and values (AS_KEYS), of queries and bandwidths (AS_QUERIES), or of rows that are
    keys and queries at once (both): then grad_keys receives the sum."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = block * R + tl.arange(0, R)
    queries += b * query_row + h * query_head
    keys += b * key_row + h * key_head
    values += b * value_row + h * value_head
    grad += b * grad_row + h * grad_head
    starts += b * count
    statistics += row.to(tl.int64) * count
    along += row.to(tl.int64) * count
    scales += row.to(tl.int64) * count
    grad_key = tl.zeros([R, D], tl.float32)
    if AS_KEYS:
        k = load_rows(keys, rows, key_step, pairs, size, D, EVEN)
        v = load_rows(values, rows, value_step, pairs, size, D, EVEN)
        grad_value = tl.zeros([R, D], tl.float32)
        lowest = block * R
        highest = tl.minimum(lowest + R, pairs) - 1
        begin = tl.maximum(lowest + delay - offset, 0) // QB * QB
        end = count
        if WINDOW:
            end = tl.minimum(end, highest + window - offset)
        if STARTS:
            numbers = tl.arange(0, BLOCKS)
            present = numbers * E < count
            at = extents + (b * tl.cdiv(count, E) + numbers) * 2
            least = tl.load(at, mask=present, other=2147483647)
            end = tl.minimum(end, tl.max(tl.where(least <= highest, numbers + 1, 0), 0) * E)
        if WINDOW:
            grad_key, grad_value = _key_span(
                grad_key, grad_value, k, v, rows, queries, grad, starts, statistics, along, scales,
                query_step, grad_step, begin, end, count, pairs, size, window, delay, offset,
                True, STARTS, WINDOW, PRECISION, QB, D, EVEN,
            )
        else:
            # From `full` on the delay closes nothing, up to `full_end` no document does.
            full = tl.maximum(tl.cdiv(tl.maximum(highest + delay - offset, 0), QB) * QB, begin)
            full_end = end
            if STARTS:
                greatest = tl.load(at + 1, mask=present, other=0)
                closed = present & (greatest > lowest) & ((numbers + 1) * E > full)
                full_end = tl.minimum(end, tl.min(tl.where(closed, numbers, 1073741824 // E), 0) * E)
            full = tl.minimum(full, tl.cdiv(tl.maximum(end, begin), QB) * QB)
            full_end = tl.maximum(full, full_end // QB * QB if STARTS else full_end)
            grad_key, grad_value = _key_span(
                grad_key, grad_value, k, v, rows, queries, grad, starts, statistics, along, scales,
                query_step, grad_step, begin, tl.minimum(full, end), count, pairs, size, window, delay, offset,
                True, STARTS, WINDOW, PRECISION, QB, D, EVEN,
            )
            grad_key, grad_value = _key_span(
                grad_key, grad_value, k, v, rows, queries, grad, starts, statistics, along, scales,
                query_step, grad_step, full, full_end, count, pairs, size, window, delay, offset,
                False, STARTS, WINDOW, PRECISION, QB, D, EVEN,
            )
            if STARTS:
                grad_key, grad_value = _key_span(
                    grad_key, grad_value, k, v, rows, queries, grad, starts, statistics, along, scales,
                    query_step, grad_step, full_end, end, count, pairs, size, window, delay, offset,
                    True, STARTS, WINDOW, PRECISION, QB, D, EVEN,
                )
        store_rows(grad_values + (b * pairs * heads + h) * size, grad_value, rows, heads * size, pairs, size, D)
        if not AS_QUERIES:
            grad_key *= 1 / LOG2E
            store_rows(grad_keys + (b * pairs * heads + h) * size, grad_key, rows, heads * size, pairs, size, D)
    if AS_QUERIES:
        q = load_rows(queries, rows, query_step, count, size, D, EVEN)
        upstream = load_rows(grad, rows, grad_step, count, size, D, EVEN)
        log_total = tl.load(statistics + rows, mask=rows < count, other=float("inf"))
        level = tl.load(along + rows, mask=rows < count, other=0.0)
        first, last = interval(starts, rows, offset, count, pairs, window, delay, STARTS, WINDOW)
        scale = tl.load(scales + rows, mask=rows < count, other=0.0)
        grad_query = grad_key  # the sums are wanted together: 64 registers of a thread less at D = 128
        none = tl.zeros([R], tl.float32)
        sums = (none, none, none)
        begin, full, full_end, end = spans(first, last, rows < count, KB)
        if WINDOW:
            grad_query, sums = _query_span(
                grad_query, sums, q, upstream, scale, log_total, level, first, last, keys, values, key_step, value_step,
                begin, end, end, size, True, PRECISION, KB, D, EVEN,
            )
        else:
            if STARTS:
                grad_query, sums = _query_span(
                    grad_query, sums, q, upstream, scale, log_total, level, first, last, keys, values, key_step, value_step,
                    begin, full, end, size, True, PRECISION, KB, D, EVEN,
                )
            grad_query, sums = _query_span(
                grad_query, sums, q, upstream, scale, log_total, level, first, last, keys, values, key_step, value_step,
                full, full_end, pairs, size, False, PRECISION, KB, D, EVEN,
            )
            grad_query, sums = _query_span(
                grad_query, sums, q, upstream, scale, log_total, level, first, last, keys, values, key_step, value_step,
                full_end, end, end, size, True, PRECISION, KB, D, EVEN,
            )
        # Not q . grad_query, which in bf16 was up to 8 times as far off as the reference: ds is rounded there. The level,
        # from a rounded result, also lets each ds_j slip by w_j times one number: the sum of all ds, for weights sum to 1.
        mean, slip, along = sums
        grad_beta = along - slip * mean
        grad_query *= 1 / LOG2E
        if AS_KEYS:
            store_rows(grad_keys + (b * pairs * heads + h) * size, grad_query, rows, heads * size, count, size, D)
        else:
            store_rows(grad_queries + (b * count * heads + h) * size, grad_query, rows, heads * size, count, size, D)
        tl.store(grad_betas + row.to(tl.int64) * count + rows, grad_beta, mask=rows < count)


@triton.jit(do_not_specialize=MOVING)
def _bandwidth_kernel(
    grad_betas, starts, slope, exponent, partial, count, pairs, heads, window, delay, offset,
    STARTS: tl.constexpr, WINDOW: tl.constexpr, E: tl.constexpr,
):
    """partial [3, H, B, blocks]: sums over E queries of the gradients of base, slope and exponent, from those of beta."""
    block = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = block * E + tl.arange(0, E)
    first, last = interval(starts + b * count, rows, offset, count, pairs, window, delay, STARTS, WINDOW)
    power, log_count = count_power(first, last, tl.load(exponent + h))
    grad_beta = tl.load(grad_betas + row.to(tl.int64) * count + rows, mask=rows < count, other=0.0)
    at = partial + (h * (tl.num_programs(1) // heads) + b) * tl.num_programs(0) + block
    sums = tl.num_programs(1) * tl.num_programs(0)  # of each parameter
    tl.store(at, tl.sum(grad_beta, 0))
    tl.store(at + sums, tl.sum(grad_beta * power, 0))
    tl.store(at + 2 * sums, tl.sum(grad_beta * power * log_count, 0) * tl.load(slope + h) / LOG2E)


def _backward_configs(width: int, narrow: bool) -> list[triton.Config]:
    # A few only: each takes the compiler some seconds, and a model has four kinds of reads. First what packed documents and
    # windows of 16-bit numbers are read with fastest.
    if tuning.INTERPRETED:
        table = "32 16 16 4 1"
    elif not narrow:
        # One for wide heads: with another on an H100, this or the reader's, Triton 3.6 made something that left its memory.
        table = "64 32 32 8 1\n64 16 16 4 1" if width <= 128 else "32 16 16 4 1"
    elif width <= 64:
        table = "128 64 64 8 2\n128 32 32 4 3\n64 64 64 4 2"
    elif width <= 128:
        table = "64 32 32 4 3\n128 64 64 8 3\n128 32 64 8 3"
    else:
        table = "64 32 32 8 2\n64 32 32 4 1"
    return configs("R QB KB", table)


@functools.cache
def _gatherer(width: int, narrow: bool) -> tuning.Tuned:
    """The backward kernel, likewise."""
    key = ("LENGTH", "WINDOW", "STARTS", "AS_KEYS", "AS_QUERIES")
    return tuning.Tuned(_backward_kernel, _backward_configs(width, narrow), key)


_BANDWIDTH = tuning.Tuned(_bandwidth_kernel, [triton.Config({}, num_warps=4, num_stages=1)], ())
_PREPARE = tuning.Tuned(_prepare_kernel, [triton.Config({}, num_warps=4, num_stages=1)], ())


def run_backward(
    grad, keys, values, base, slope, exponent, queries, starts, window, delay, offset, out, statistics, bandwidths=True
):
    """The gradients of keys, values, base, slope and exponent together, fp32 [3, H], and queries. Without `bandwidths` the
    third is empty, and without queries of their own the last."""
    same = queries is None
    grad, keys, values = plain(grad), plain(keys), plain(values)
    queries = keys if same else plain(queries)
    batch, count, heads, size = queries.shape
    pairs, device = keys.shape[1], keys.device
    grad_keys, grad_values = (torch.empty(keys.shape, dtype=keys.dtype, device=device) for _ in range(2))
    grad_queries = torch.empty(0 if same else queries.shape, dtype=keys.dtype, device=device)
    if count == 0 or batch * heads == 0:
        return grad_keys.zero_(), grad_values.zero_(), base.new_zeros(3 if bandwidths else 0, heads), grad_queries
    settings = constants(queries, starts, window) | {"E": EXTENT, "BLOCKS": tuning.bucket(triton.cdiv(count, EXTENT))}
    width, gather = settings["D"], _gatherer(settings["D"], queries.element_size() == 2)
    blocks = triton.cdiv(count, EXTENT)
    along, scales = torch.empty(2, batch, heads, count, dtype=torch.float32, device=device)
    extents = torch.empty(batch, blocks, 2, dtype=torch.int32, device=device)
    marks = extents if starts is None else starts
    _PREPARE(
        (blocks, batch * heads), grad, out, marks, base, slope, exponent, along, scales, extents, count, pairs, heads, size,
        *grad.stride()[:3], window or 0, delay, offset, on=grad,
        STARTS=starts is not None, WINDOW=window is not None, D=width, EVEN=settings["EVEN"], E=EXTENT,
    )  # fmt: skip
    grad_betas = torch.empty_like(along)
    for as_keys, as_queries in ((True, True),) if same else ((True, False), (False, True)):
        rows = count if as_queries else pairs
        if rows:
            gather(
                lambda meta, rows=rows: (triton.cdiv(rows, meta["R"]), batch * heads),
                queries, keys, values, grad, marks, extents, statistics, along, scales,
                grad_queries, grad_keys, grad_values, grad_betas, count, pairs, heads, size,
                *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *grad.stride()[:3],
                window or 0, delay, offset, tuning.bucket(pairs), on=keys, AS_KEYS=as_keys, AS_QUERIES=as_queries,
                **settings,
            )  # fmt: skip
    if not bandwidths:  # attention, whose bandwidth is fixed
        return grad_keys, grad_values, base.new_empty(0, heads), grad_queries
    partial = torch.empty(3, heads, batch * blocks, dtype=torch.float32, device=device)
    _BANDWIDTH(
        (blocks, batch * heads), grad_betas, marks, slope, exponent, partial, count, pairs, heads, window or 0, delay,
        offset, on=grad, STARTS=starts is not None, WINDOW=window is not None, E=EXTENT,
    )  # fmt: skip
    return grad_keys, grad_values, partial.sum(2), grad_queries

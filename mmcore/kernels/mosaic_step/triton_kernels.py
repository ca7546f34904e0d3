"""The Triton kernels of a decoding step; see triton.py for how they follow one another.

Weights and states are found through tables of addresses: one launch then reads many matrices, or both memories of a layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmcore.kernels.memory_read.triton_few import join_shares, read_pairs
from mmcore.kernels.memory_read.triton_parts import LOG2E, count_power, load_rows

JOB = tl.constexpr(6)
"""Numbers of a job, int64: addresses of a block of a matrix's rows and of their scales, the same of the second matrix, the
column that the first row's sum goes to, how many rows there are."""

MEMORY = tl.constexpr(16)
"""Numbers of a memory, int64: addresses of log_scale, vector, pending_key, pending_raw, keys, values, clock, mix, scale,
base, slope, exponent; numbers from row to row of the store; window, delay; 1 where the store is another's, and stays."""

ROWS = tl.constexpr(64)
"""Rows of a job at most."""


@triton.jit
def _address(place, TYPE: tl.constexpr, ALIGNED: tl.constexpr = True):
    """The address that lies at `place`, a multiple of 16 bytes as most tensors' are: the compiler then loads so many at
    once."""
    address = tl.load(place).to(tl.pointer_type(TYPE))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def _block(weight, n, count, width, columns):
    """Rows n of a block of a matrix, zero from `count` on: [N, K]."""
    inside = (n < count)[:, None] & (columns < width)[None, :]
    return tl.load(weight + n[:, None] * width + columns[None, :], mask=inside, other=0)


@triton.jit(do_not_specialize=("rows",))
def product_kernel(
    jobs, x, norm, out, width, rows, x_row, out_row, eps,
    TYPE: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr,
    ADD: tl.constexpr, SCALED: tl.constexpr, B: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):
    """out[b, column + n] = sum_k W[n, k] x[b, k] for N rows of a job and B rows of x; with ADD, added to what lies there.

    NORM: RMSNorm(x) stands for x; its reciprocal root is applied to the sums, so x times the norm's weight must fit NARROW.
    GATED: a job has two matrices, and the result is SiLU(W x) * (W' x). SCALED: weights of TYPE int8, with a scale for each
    row. One row takes multiply-adds in fp32; B > 1 takes products of tiles, in which both sides are NARROW.
    """
    parts: tl.constexpr = ROWS // N
    job = jobs + tl.program_id(0) // parts * JOB
    n = tl.program_id(0) % parts * N + tl.arange(0, N)
    b = tl.program_id(1) * B + tl.arange(0, B)
    there = b < rows
    count = tl.load(job + 5)
    weight = _address(job, TYPE)
    second = _address(job + 2 if GATED else job, TYPE)
    sums = tl.zeros([N, K] if B == 1 else [B, N], tl.float32)
    others = sums
    squares = tl.zeros([B, K], tl.float32)
    for k0 in tl.range(0, tl.where(tl.program_id(0) % parts * N < count, width, 0), K, num_stages=STAGES):
        columns = k0 + tl.arange(0, K)
        w = _block(weight, n, count, width, columns)
        inside = there[:, None] & (columns < width)[None, :]
        a = tl.load(x + b.to(tl.int64)[:, None] * x_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
            a *= tl.load(norm + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        if B == 1:
            sums += w.to(tl.float32) * a
        else:
            sums = tl.dot(a.to(NARROW), tl.trans(w.to(NARROW)), sums, input_precision=PRECISION)
        if GATED:
            w = _block(second, n, count, width, columns)
            if B == 1:
                others += w.to(tl.float32) * a
            else:
                others = tl.dot(a.to(NARROW), tl.trans(w.to(NARROW)), others, input_precision=PRECISION)
    result = tl.sum(sums, 1)[None, :] if B == 1 else sums
    if NORM:
        root = 1.0 / tl.sqrt(tl.sum(squares, 1) / width + eps)
        result *= root[:, None]
    if SCALED:
        result *= tl.load(_address(job + 1, tl.float32) + n, mask=n < count, other=0.0)[None, :]
    if GATED:
        up = tl.sum(others, 1)[None, :] if B == 1 else others
        if NORM:
            up *= root[:, None]
        if SCALED:
            up *= tl.load(_address(job + 3, tl.float32) + n, mask=n < count, other=0.0)[None, :]
        result = result / (1.0 + tl.exp(-result)) * up
    target = out + b.to(tl.int64)[:, None] * out_row + tl.load(job + 4) + n[None, :]
    inside = there[:, None] & (n < count)[None, :]
    if ADD:
        result += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def memory_kernel(
    memories, projected, starts, heads, size, row_step, PAIRS: tl.constexpr, WAITING: tl.constexpr, STARTS: tl.constexpr,
    D: tl.constexpr,
):
    """One head of one row of one memory takes a token: the waiting pair gets its value (9) and goes into the store, the
    recurrence goes a step on (8), and the new key and v~ wait.

    `projected` [B, .] holds k~ and v~ of the short-term memory, of the long-term one, then gates and decays of each.
    """
    row, m = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(0) // heads
    b, h = row // heads, row % heads
    memory = memories + m * MEMORY
    columns = tl.arange(0, D)
    inside = columns < size
    width = heads * size
    line = projected + b.to(tl.int64) * row_step
    raw = tl.load(line + 2 * m * width + h * size + columns, mask=inside, other=0.0)
    value = tl.load(line + (2 * m + 1) * width + h * size + columns, mask=inside, other=0.0)
    gate = tl.load(line + 4 * width + 2 * m * heads + h)
    decay = -tl.abs(tl.load(line + 4 * width + (2 * m + 1) * heads + h))
    clock = tl.load(_address(memory + 6, tl.int64))
    own = row.to(tl.int64) * size + columns

    pending_key, pending_raw = _address(memory + 2, WAITING) + own, _address(memory + 3, WAITING) + own
    before = tl.load(pending_raw, mask=inside, other=0.0).to(tl.float32)
    mix = tl.load(_address(memory + 7, tl.float32) + h)
    mixed = mix * before + (1 - mix) * value
    norm = tl.sqrt(tl.sum(mixed * mixed, 0))
    mixed *= tl.load(_address(memory + 8, tl.float32) + h) / tl.where(norm == 0, 1.0, norm)
    slot = b.to(tl.int64) * tl.load(memory + 12) + clock * width + h * size + columns
    completed = tl.load(pending_key, mask=inside, other=0.0)
    own_store = columns < tl.where(tl.load(memory + 15) == 0, size, 0)
    tl.store(_address(memory + 4, PAIRS, False) + slot, completed.to(PAIRS), mask=own_store)
    tl.store(_address(memory + 5, PAIRS, False) + slot, mixed.to(PAIRS), mask=own_store)

    log_scale, vector = _address(memory, tl.float32) + row, _address(memory + 1, tl.float32) + own
    carried = decay + tl.load(log_scale)
    old = tl.load(vector, mask=inside, other=0.0)
    if STARTS:
        fresh = tl.load(starts + m * rows + b) == clock + 1  # the row begins with this token
        carried = tl.where(fresh, float("-inf"), carried)
        old = tl.where(fresh, 0.0, old)
    top = tl.maximum(gate, carried)
    new = tl.exp(gate - top) * raw + tl.exp(carried - top) * old
    norm = tl.sqrt(tl.sum(new * new, 0))
    key = new / tl.where(norm == 0, 1.0, norm)
    tl.store(log_scale, top)
    tl.store(vector, new, mask=inside)
    tl.store(pending_key, key.to(WAITING), mask=inside)
    tl.store(pending_raw, value.to(WAITING), mask=inside)


@triton.jit(do_not_specialize=("short",))
def share_kernel(
    memories, starts, sums, totals, tops, heads, size, short, PAIRS: tl.constexpr, WAITING: tl.constexpr,
    PRECISION: tl.constexpr, STARTS: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):
    """One share of what a head's new key reads: the first `short` programs share the short-term memory's pairs, the others
    the long-term memory's."""
    program, row = tl.program_id(0), tl.program_id(1)
    b, h = row // heads, row % heads
    m = (program >= short).to(tl.int32)
    share = program - m * short
    shares = tl.where(m == 1, tl.num_programs(0) - short, short)
    memory = memories + m * MEMORY
    clock = tl.load(_address(memory + 6, tl.int64)).to(tl.int32)
    # The query stands behind the pair that has just been stored.
    last = clock + 1 - tl.load(memory + 14).to(tl.int32)
    first = tl.maximum(clock + 2 - tl.load(memory + 13).to(tl.int32), 0)
    if STARTS:
        first = tl.maximum(first, tl.load(starts + m * (tl.num_programs(1) // heads) + b))
    power, _ = count_power(first, last, tl.load(_address(memory + 11, tl.float32) + h))
    slope, base = tl.load(_address(memory + 10, tl.float32) + h), tl.load(_address(memory + 9, tl.float32) + h)
    scale = (slope * power + base) * LOG2E
    only = tl.arange(0, M)
    q = load_rows(_address(memory + 2, WAITING) + row.to(tl.int64) * size, only, 0, 1, size, D, EVEN).to(PAIRS)
    step = tl.load(memory + 12)
    step = tl.multiple_of(step, 16) if ALIGNED else step
    offset = b.to(tl.int64) * step + h * size
    keys, values = _address(memory + 4, PAIRS, ALIGNED) + offset, _address(memory + 5, PAIRS, ALIGNED) + offset
    count = tl.maximum(last + 1 - first, 0)
    each = tl.cdiv(tl.cdiv(count, N), shares) * N
    begin = first + share * each
    acc, total, top = read_pairs(
        q, scale + tl.zeros([M], tl.float32), first + tl.zeros([M], tl.int32), last + tl.zeros([M], tl.int32),
        keys, values, heads * size, heads * size, begin, tl.minimum(begin + each, last + 1), last + 1, size,
        PRECISION, M, N, D, EVEN,
    )
    at = row.to(tl.int64) * tl.num_programs(0) + program
    columns = tl.arange(0, D)
    tl.store(sums + at * size + columns[None, :] + only[:, None] * 0, acc,
             mask=(only == 0)[:, None] & (columns < size)[None, :])
    tl.store(totals + at + only, total, mask=only == 0)
    tl.store(tops + at + only, top, mask=only == 0)


@triton.jit(do_not_specialize=("short", "shares"))
def join_kernel(memories, sums, totals, tops, read, heads, size, short, shares, D: tl.constexpr, S: tl.constexpr):
    """What a head of a memory has read, into [short-term heads | long-term heads]; and its store has one more pair."""
    row, m = tl.program_id(0), tl.program_id(1)
    first = m * short
    count = tl.where(m == 1, shares - short, short)
    at = row.to(tl.int64) * shares + first
    columns = tl.arange(0, D)
    result = join_shares(sums + at * size, totals + at, tops + at, count, 1, size, D, S)
    b, h = (row // heads).to(tl.int64), row % heads
    target = read + (b * 2 + m) * heads * size + h * size
    tl.store(target + columns, result.to(read.dtype.element_ty), mask=columns < size)
    if row == 0:  # no program of this launch reads it
        clock = _address(memories + m * MEMORY + 6, tl.int64)
        tl.store(clock, tl.load(clock) + 1)

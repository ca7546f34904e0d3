"""The Triton kernels of a decoding step; see triton.py for how they follow one another.

Weights and states are found through tables of addresses: one launch then reads many matrices, or both memories of a layer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmcore.kernels import tuning
from mmcore.kernels.memory_read.triton_few import join_shares, read_pairs
from mmcore.kernels.memory_read.triton_parts import LOG2E, count_power

JOB = tl.constexpr(6)
"""Numbers of a job, int64: addresses of a block of a matrix's rows and of their scales, the same of the second matrix, the
column that the first row's sum goes to, how many rows there are."""

MEMORY = tl.constexpr(16)
"""Numbers of a memory, int64: addresses of log_scale, vector, pending_key, pending_raw, keys, values, clock, mix, scale,
base, slope, exponent; numbers from row to row of the store; window, delay; 1 where the store is another's, and stays."""

ROWS = tl.constexpr(64)
"""Rows of a job at most."""


ASSEMBLER = tl.constexpr(not tuning.INTERPRETED and torch.version.hip is None)
_WIDEN = tl.constexpr("""{
.reg .b32 x;
xor.b32 x, $4, 0x80808080;
prmt.b32 $0, x, 0x4B000000, 0x7440;
prmt.b32 $1, x, 0x4B000000, 0x7441;
prmt.b32 $2, x, 0x4B000000, 0x7442;
prmt.b32 $3, x, 0x4B000000, 0x7443;
add.f32 $0, $0, 0fCB000080;
add.f32 $1, $1, 0fCB000080;
add.f32 $2, $2, 0fCB000080;
add.f32 $3, $3, 0fCB000080;
}""")
"""Four int8 to fp32: x + 128 as the last byte of the float 2^23 is 2^23 + 128 + x, exactly. The instruction that converts
one number takes four times as long as each of these, and was what products of int8 weights waited for."""


@triton.jit
def _wide(w, SCALED: tl.constexpr):
    """Weights in fp32; int8 where SCALED."""
    if SCALED and ASSEMBLER:
        return tl.inline_asm_elementwise(_WIDEN, "=r,=r,=r,=r,r", [w], dtype=tl.float32, is_pure=True, pack=4)
    return w.to(tl.float32)


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
            sums += _wide(w, SCALED) * a
        else:
            sums = tl.dot(a.to(NARROW), tl.trans(w.to(NARROW)), sums, input_precision=PRECISION)
        if GATED:
            w = _block(second, n, count, width, columns)
            if B == 1:
                others += _wide(w, SCALED) * a
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


# Programs ask for these twice: registers that held all of it while it reads would leave room for three
# programs a multiprocessor, not five.


@triton.jit
def _new_key(memory, projected, starts, row, m, rows, heads, size, row_step, STARTS: tl.constexpr, D: tl.constexpr):
    """The recurrence of one head of one row of a memory, one step on (8): (key [D], log_scale, vector [D]), not stored.

    `projected` [B, .] holds k~ and v~ of the short-term memory, of the long-term one, then gates and decays of each.
    """
    b, h = row // heads, row % heads
    columns = tl.arange(0, D)
    inside = columns < size
    width = heads * size
    line = projected + b.to(tl.int64) * row_step
    raw = tl.load(line + 2 * m * width + h * size + columns, mask=inside, other=0.0)
    gate = tl.load(line + 4 * width + 2 * m * heads + h)
    decay = -tl.abs(tl.load(line + 4 * width + (2 * m + 1) * heads + h))
    carried = decay + tl.load(_address(memory, tl.float32) + row)
    old = tl.load(_address(memory + 1, tl.float32) + row.to(tl.int64) * size + columns, mask=inside, other=0.0)
    if STARTS:
        clock = tl.load(_address(memory + 6, tl.int64))
        fresh = tl.load(starts + m * rows + b) == clock + 1  # the row begins with this token
        carried = tl.where(fresh, float("-inf"), carried)
        old = tl.where(fresh, 0.0, old)
    top = tl.maximum(gate, carried)
    vector = tl.exp(gate - top) * raw + tl.exp(carried - top) * old
    norm = tl.sqrt(tl.sum(vector * vector, 0))
    return vector / tl.where(norm == 0, 1.0, norm), top, vector


@triton.jit
def _waiting_pair(memory, projected, row, m, heads, size, row_step, WAITING: tl.constexpr, D: tl.constexpr):
    """[D] each: the key that waited, the value (9) that it gets now, and the new v~, which is part of it."""
    b, h = row // heads, row % heads
    columns = tl.arange(0, D)
    inside = columns < size
    line = projected + b.to(tl.int64) * row_step + (2 * m + 1) * heads * size
    value = tl.load(line + h * size + columns, mask=inside, other=0.0)
    own = row.to(tl.int64) * size + columns
    key = tl.load(_address(memory + 2, WAITING) + own, mask=inside, other=0.0)
    before = tl.load(_address(memory + 3, WAITING) + own, mask=inside, other=0.0).to(tl.float32)
    mix = tl.load(_address(memory + 7, tl.float32) + h)
    mixed = mix * before + (1 - mix) * value
    norm = tl.sqrt(tl.sum(mixed * mixed, 0))
    mixed *= tl.load(_address(memory + 8, tl.float32) + h) / tl.where(norm == 0, 1.0, norm)
    return key, mixed, value


@triton.jit(do_not_specialize=("short",))
def read_kernel(
    memories, projected, starts, sums, totals, tops, arrivals, read, heads, size, short, row_step,
    PAIRS: tl.constexpr, WAITING: tl.constexpr, PRECISION: tl.constexpr, STARTS: tl.constexpr, EVEN: tl.constexpr,
    ALIGNED: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):
    """Both memories of a layer take a token and answer its query.

    A program reads one share of a head's pairs: the first `short` programs share the short-term memory's, the others the
    long-term memory's. Each makes the new key for itself. The last that is done with a head joins the shares into `read`,
    [short-term heads | long-term heads], and only it changes the state: the waiting pair goes into the store, the recurrence
    a step on, the new key and v~ wait. The last of a memory's heads moves its clock on.

    arrivals: int32 [2, B H + 1] zeros, how many programs are done with a head and, last, heads with a memory; zeros again
    at the end. The order of sums is the shares', whoever joins them.
    """
    program, row = tl.program_id(0), tl.program_id(1)
    rows = tl.num_programs(1)
    b, h = row // heads, row % heads
    m = (program >= short).to(tl.int32)
    share = program - m * short
    shares = tl.where(m == 1, tl.num_programs(0) - short, short)
    memory = memories + m * MEMORY
    clock = tl.load(_address(memory + 6, tl.int64))
    query = _new_key(memory, projected, starts, row, m, rows // heads, heads, size, row_step, STARTS, D)[0]
    query = query.to(WAITING).to(PAIRS)
    # The query stands behind the waiting pair, which gets the number `clock`.
    now = clock.to(tl.int32)
    last = now + 1 - tl.load(memory + 14).to(tl.int32)
    first = tl.maximum(now + 2 - tl.load(memory + 13).to(tl.int32), 0)
    if STARTS:
        first = tl.maximum(first, tl.load(starts + m * (rows // heads) + b))
    power, _ = count_power(first, last, tl.load(_address(memory + 11, tl.float32) + h))
    slope, base = tl.load(_address(memory + 10, tl.float32) + h), tl.load(_address(memory + 9, tl.float32) + h)
    scale = (slope * power + base) * LOG2E
    only, columns = tl.arange(0, M), tl.arange(0, D)
    q = tl.where((only == 0)[:, None], query[None, :], 0.0).to(PAIRS)
    step = tl.load(memory + 12)
    step = tl.multiple_of(step, 16) if ALIGNED else step
    offset = b.to(tl.int64) * step + h * size
    keys, values = _address(memory + 4, PAIRS, ALIGNED) + offset, _address(memory + 5, PAIRS, ALIGNED) + offset
    stored = tl.minimum(last, now - 1)
    count = tl.maximum(stored + 1 - first, 0)
    each = tl.cdiv(tl.cdiv(count, N), shares) * N
    begin = first + share * each
    acc, total, top = read_pairs(
        q, scale + tl.zeros([M], tl.float32), first + tl.zeros([M], tl.int32), stored + tl.zeros([M], tl.int32),
        keys, values, heads * size, heads * size, begin, tl.minimum(begin + each, stored + 1), stored + 1, size,
        PRECISION, M, N, D, EVEN,
    )
    if share == 0:  # the waiting pair, which is not in the store yet
        completed, mixed, value = _waiting_pair(memory, projected, row, m, heads, size, row_step, WAITING, D)
        score = tl.sum(query.to(tl.float32) * completed.to(PAIRS).to(tl.float32), 0) * scale
        score = tl.where((first <= now) & (now <= last), score, float("-inf"))
        greatest = tl.maximum(top, score)
        finite = tl.where(greatest == float("-inf"), 0.0, greatest)
        shrink, weight = tl.exp2(top - finite), tl.exp2(score - finite)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * mixed.to(PAIRS).to(tl.float32)[None, :]
        top = greatest

    at = row.to(tl.int64) * tl.num_programs(0) + program
    tl.store(sums + at * size + columns[None, :] + only[:, None] * 0, acc,
             mask=(only == 0)[:, None] & (columns < size)[None, :])
    tl.store(totals + at + only, total, mask=only == 0)
    tl.store(tops + at + only, top, mask=only == 0)
    tl.debug_barrier()  # what all threads have stored is there before one of them says so
    arrivals += m * (rows + 1)
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == shares - 1:
        key, log_scale, vector = _new_key(
            memory, projected, starts, row, m, rows // heads, heads, size, row_step, STARTS, D
        )
        completed, mixed, value = _waiting_pair(memory, projected, row, m, heads, size, row_step, WAITING, D)
        at = row.to(tl.int64) * tl.num_programs(0) + m * short
        result = join_shares(sums + at * size, totals + at, tops + at, shares, 1, size, D, S)
        inside = columns < size
        target = read + (b.to(tl.int64) * 2 + m) * heads * size + h * size
        tl.store(target + columns, result.to(read.dtype.element_ty), mask=inside)
        slot = clock * heads * size + columns
        own_store = columns < tl.where(tl.load(memory + 15) == 0, size, 0)
        tl.store(keys + slot, completed.to(PAIRS), mask=own_store)
        tl.store(values + slot, mixed.to(PAIRS), mask=own_store)
        own = row.to(tl.int64) * size + columns
        tl.store(_address(memory, tl.float32) + row, log_scale)
        tl.store(_address(memory + 1, tl.float32) + own, vector, mask=inside)
        tl.store(_address(memory + 2, WAITING) + own, key.to(WAITING), mask=inside)
        tl.store(_address(memory + 3, WAITING) + own, value.to(WAITING), mask=inside)
        tl.store(arrivals + row, 0)
        if tl.atomic_add(arrivals + rows, 1, sem="acq_rel") == rows - 1:
            tl.store(arrivals + rows, 0)
            tl.store(_address(memory + 6, tl.int64), clock + 1)

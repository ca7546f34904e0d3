"""The Triton kernels of gated_scan; see triton.py for how they share the work.

Tiles of C steps lie in registers so that all steps of a column are in one thread (`_columns`): scans over the steps then
are plain multiply-adds, without shuffles, shared memory or barriers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _after(sum_a, top_a, sum_b, top_b):
    """The log-maximum after two stretches of steps, of which the second decays what came before by sum_b."""
    return sum_a + sum_b, tl.maximum(top_a + sum_b, top_b)


@triton.jit
def _recur(forget_a, u_a, forget_b, u_b):
    """u after two stretches of steps, of which the second keeps forget_b of what came before."""
    return forget_a * forget_b, u_a * forget_b + u_b


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def prepare_kernel(
    gates, decays, resets, log_scale, forgets, inputs, tops, length, heads, padded,
    gate_row, gate_step, gate_head, decay_row, decay_step, decay_head, reset_row, reset_step,
    RESETS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Of one head: M of all steps (`tops`, the one before the first step first), exp(log_decay_t + M_{t-1} - M_t)
    (`forgets`, 0 where a document starts) and exp(log_gate_t - M_t) (`inputs`).

    M may be off by a rounding: it is a unit, and both factors are computed from the one that was stored. Steps past the
    end add nothing and forget nothing: their gates are -inf.
    """
    row = tl.program_id(0)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    gates += b * gate_row + h * gate_head
    decays += b * decay_row + h * decay_head
    resets += b * reset_row
    forgets += row.to(tl.int64) * (padded + 1)
    inputs += row.to(tl.int64) * padded
    tops += row.to(tl.int64) * (padded + 1)
    top = tl.load(log_scale + row) if STATE else float("-inf")
    tl.store(tops, top)
    tl.store(forgets + padded, 0.0)
    for t0 in range(0, padded, BLOCK):
        steps = t0 + tl.arange(0, BLOCK)
        inside = steps < length
        gate = tl.load(gates + steps.to(tl.int64) * gate_step, mask=inside, other=float("-inf")).to(tl.float32)
        decay = tl.load(decays + steps.to(tl.int64) * decay_step, mask=inside, other=0).to(tl.float32)
        if RESETS:
            reset = tl.load(resets + steps.to(tl.int64) * reset_step, mask=inside, other=0)
            decay = tl.where(reset != 0, float("-inf"), decay)
        sums, maxima = tl.associative_scan((decay, gate), 0, _after)
        maxima = tl.maximum(maxima, sums + top)
        top = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, maxima, 0.0), 0)
        tl.store(tops + 1 + steps, maxima, mask=steps < padded)
        tl.debug_barrier()
        before = tl.load(tops + steps, mask=steps < padded, other=0.0)
        tl.store(forgets + steps, tl.exp(decay + (before - maxima)), mask=steps < padded)
        tl.store(inputs + steps, tl.exp(gate - maxima), mask=steps < padded)


@triton.jit
def _columns(D: tl.constexpr, V: tl.constexpr):
    """The columns of a head, V neighbours for each thread: with V * threads = D no thread has half of a column's steps."""
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, D), V), V)


@triton.jit
def _tile(base, offsets, t0, step, length, size, C: tl.constexpr, D: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr):
    """Rows t0 .. t0 + C - 1 of a head at `base`, [C, D], zero outside; offsets: of a tile's numbers from its first."""
    inside = (tl.arange(0, C) < length - t0)[:, None]
    if not EVEN:
        inside = inside & (_columns(D, V) < size)[None, :]
    return tl.load(base + t0 * tl.full((), step, tl.int64) + offsets, mask=inside, other=0)


@triton.jit
def _store(base, tile, offsets, t0, step, length, size, C: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
           EVEN: tl.constexpr):  # fmt: skip
    inside = (tl.arange(0, C) < length - t0)[:, None]
    if not EVEN:
        inside = inside & (_columns(D, V) < size)[None, :]
    tl.store(base + t0 * tl.full((), step, tl.int64) + offsets, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _sums(x, forget, u_in, C: tl.constexpr):
    """u of all steps of a chunk: u_t = forget_t u_{t-1} + x_t from u_in."""
    first = (tl.arange(0, C) == 0)[:, None]
    x += tl.where(first, forget[:, None] * u_in[None, :], 0.0)
    return tl.associative_scan((tl.broadcast_to(forget[:, None], x.shape), x), 0, _recur)[1]


@triton.jit
def _row(tile, which: tl.constexpr, C: tl.constexpr):
    """One row of a tile whose columns lie in one thread each: nothing is computed."""
    return tl.sum(tl.where((tl.arange(0, C) == which)[:, None], tile, 0.0), 0)


@triton.jit
def _sums_back(x, onward, g_next, C: tl.constexpr):
    """g of all steps of a chunk: g_t = x_t + onward_t g_{t+1} from g_next. Written out, for a reverse scan shuffles."""
    steps, factors = tl.arange(0, C), tl.broadcast_to(onward[:, None], x.shape)
    g, all_g = g_next, x
    for back in tl.static_range(C):
        g = _row(x, C - 1 - back, C) + _row(factors, C - 1 - back, C) * g
        all_g = tl.where((steps == C - 1 - back)[:, None], g[None, :], all_g)
    return all_g


@triton.jit
def _decay_gradients(for_gate, forget, arriving, C: tl.constexpr):
    """Gradients of the decays of a chunk, g_t . forget_t u_{t-1}. Since keys do not change with the length of u_t, what
    reaches u_t from its own key is orthogonal to it, and so g_t . u_t = forget_{t+1} g_{t+1} . u_t: the next step's
    gradient, from which the gate's g_t . input_t k~_t goes off. `arriving` is that of the step after the chunk."""
    steps = tl.arange(0, C)
    found = for_gate
    for back in tl.static_range(C):
        arriving -= tl.sum(tl.where(steps == C - 1 - back, for_gate, 0.0), 0)
        found = tl.where(steps == C - 1 - back, arriving, found)
    return tl.where(forget == 0, 0.0, found)


@triton.jit
def summary_kernel(
    raw, forgets, inputs, vectors, factors, length, heads, size, raw_row, raw_step, raw_head, per_segment, LENGTH,
    EVEN: tl.constexpr, C: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):
    """What a segment adds to the state: u at its end when it starts from nothing, and the factor of the state that it
    starts from."""
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    chunks = tl.cdiv(length, C)
    raw += b * raw_row + h * raw_head
    forgets += row.to(tl.int64) * (chunks * C + 1)
    inputs += row.to(tl.int64) * chunks * C
    steps = tl.arange(0, C)
    offsets = steps[:, None] * raw_step + _columns(D, V)[None, :]
    u = tl.zeros([D], tl.float32)
    factor = 1.0
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    next_tile = _tile(raw, offsets, first * C, raw_step, length, size, C, D, V, EVEN)
    for n in range(first, last):
        tile, t0 = next_tile, n * C
        next_tile = _tile(raw, offsets, tl.minimum(n + 1, last - 1) * C, raw_step, length, size, C, D, V, EVEN)
        forget, weight = tl.load(forgets + t0 + steps), tl.load(inputs + t0 + steps)
        u = _row(_sums(tile.to(tl.float32) * weight[:, None], forget, u, C), C - 1, C)
        factor *= tl.reduce(forget, 0, _times)
    at = row * tl.num_programs(0) + segment
    tl.store(vectors + at.to(tl.int64) * D + _columns(D, V), u)
    tl.store(factors + at, factor)


@triton.jit
def _entry(vectors, factors, vector, segment, D: tl.constexpr, V: tl.constexpr):
    """The state that enters `segment`: the initial one and the sums of the segments before, folded."""
    folded, weight = tl.zeros([D], tl.float32), 1.0
    for back in range(0, segment):
        r = segment - 1 - back
        folded += weight * tl.load(vectors + r * D + _columns(D, V))
        weight *= tl.load(factors + r)
    return folded + weight * vector


@triton.jit
def forward_kernel(
    raw, forgets, inputs, vector, keys, new_vector, entries, inverses, vectors, factors,
    length, heads, size, raw_row, raw_step, raw_head, per_segment, LENGTH,
    STATE: tl.constexpr, KEEP: tl.constexpr, SEGMENTS: tl.constexpr, EVEN: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):
    """Keys of one segment of one head; the last segment's program also writes the state after the last step."""
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    columns = _columns(D, V)
    chunks = tl.cdiv(length, C)
    raw += b * raw_row + h * raw_head
    keys += (b * length * heads + h) * size
    forgets += row.to(tl.int64) * (chunks * C + 1)
    inputs += row.to(tl.int64) * chunks * C
    entries += row.to(tl.int64) * chunks * size
    inverses += row.to(tl.int64) * chunks * C
    u_in = tl.zeros([D], tl.float32)
    if STATE:
        u_in = tl.load(vector + row.to(tl.int64) * size + columns, mask=columns < size, other=0.0)
    if SEGMENTS:
        at = row.to(tl.int64) * tl.num_programs(0)
        u_in = _entry(vectors + at * D, factors + at, u_in, segment, D, V)
    steps = tl.arange(0, C)
    offsets = steps[:, None] * raw_step + columns[None, :]
    key_offsets = steps[:, None] * (heads * size) + columns[None, :]
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    next_tile = _tile(raw, offsets, first * C, raw_step, length, size, C, D, V, EVEN)
    next_forget, next_weight = tl.load(forgets + first * C + steps), tl.load(inputs + first * C + steps)
    for n in range(first, last):
        tile, forget, weight = next_tile, next_forget, next_weight
        t1 = tl.minimum(n + 1, last - 1) * C
        next_tile = _tile(raw, offsets, t1, raw_step, length, size, C, D, V, EVEN)
        next_forget, next_weight = tl.load(forgets + t1 + steps), tl.load(inputs + t1 + steps)
        if KEEP:
            tl.store(entries + n * size + columns, u_in, mask=columns < size)
        u = _sums(tile.to(tl.float32) * weight[:, None], forget, u_in, C)
        square = tl.sum(u * u, 1)
        inverse = tl.where(square == 0, 0.0, tl.rsqrt(square))
        if KEEP:
            tl.store(inverses + n * C + steps, inverse)
        _store(keys, u * inverse[:, None], key_offsets, n * C, heads * size, length, size, C, D, V, EVEN)
        u_in = _row(u, C - 1, C)
    if last == chunks:
        tl.store(new_vector + row.to(tl.int64) * size + columns, u_in, mask=columns < size)


@triton.jit
def backward_kernel(
    grad, raw, forgets, inputs, entries, inverses, grad_raw, grad_gates, grad_decays, ends, factors,
    length, heads, size, grad_row, grad_step, grad_head, raw_row, raw_step, raw_head, per_segment, LENGTH,
    SUMMARY: tl.constexpr, SEGMENTS: tl.constexpr, EVEN: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):
    """Gradients of one segment of one head, walked backwards: g_t = direct_t + forget_{t+1} g_{t+1} for u_t.

    With SUMMARY nothing is written but g of the segment's first step when nothing arrives from the segments that follow
    (`ends`), and the factor of what would arrive (`factors`).
    """
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    columns = _columns(D, V)
    chunks = tl.cdiv(length, C)
    grad += b * grad_row + h * grad_head
    raw += b * raw_row + h * raw_head
    grad_raw += (b * length * heads + h) * size
    grad_gates += b * length * heads + h
    grad_decays += b * length * heads + h
    forgets += row.to(tl.int64) * (chunks * C + 1)
    inputs += row.to(tl.int64) * chunks * C
    entries += row.to(tl.int64) * chunks * size
    inverses += row.to(tl.int64) * chunks * C
    g_next = tl.zeros([D], tl.float32)
    factor = 1.0
    if SEGMENTS and not SUMMARY:
        at = row.to(tl.int64) * tl.num_programs(0)
        for r in range(segment + 1, tl.num_programs(0)):
            g_next += factor * tl.load(ends + (at + r) * D + columns)
            factor *= tl.load(factors + at + r)
    steps = tl.arange(0, C)
    offsets = steps[:, None] * raw_step + columns[None, :]
    grad_offsets = steps[:, None] * grad_step + columns[None, :]
    key_offsets = steps[:, None] * (heads * size) + columns[None, :]
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    t1 = (last - 1) * C
    next_tile = _tile(raw, offsets, t1, raw_step, length, size, C, D, V, EVEN)
    next_grad = _tile(grad, grad_offsets, t1, grad_step, length, size, C, D, V, EVEN)
    for back in range(0, last - first):
        n = last - 1 - back
        t0 = n * C
        tile, upstream = next_tile, next_grad.to(tl.float32)
        t1 = tl.maximum(n - 1, first) * C
        next_tile = _tile(raw, offsets, t1, raw_step, length, size, C, D, V, EVEN)
        next_grad = _tile(grad, grad_offsets, t1, grad_step, length, size, C, D, V, EVEN)
        forget, weight = tl.load(forgets + t0 + steps), tl.load(inputs + t0 + steps)
        onward, inverse = tl.load(forgets + t0 + 1 + steps), tl.load(inverses + t0 + steps)
        u_in = tl.load(entries + n * size + columns, mask=columns < size, other=0.0)
        x = tile.to(tl.float32) * weight[:, None]
        u = _sums(x, forget, u_in, C)
        along = tl.sum(u * upstream, 1) * inverse * inverse
        arriving = tl.sum(tl.load(forgets + t0 + C) * g_next * _row(u, C - 1, C), 0)
        g = _sums_back((upstream - u * along[:, None]) * inverse[:, None], onward, g_next, C)
        if not SUMMARY:
            _store(grad_raw, g * weight[:, None], key_offsets, t0, heads * size, length, size, C, D, V, EVEN)
            for_gate = tl.sum(g * x, 1)
            for_decay = _decay_gradients(for_gate, forget, arriving, C)
            at_steps = (t0 + steps).to(tl.int64) * heads
            inside = steps < length - t0
            tl.store(grad_gates + at_steps, for_gate.to(grad_gates.dtype.element_ty), mask=inside)
            tl.store(grad_decays + at_steps, for_decay.to(grad_decays.dtype.element_ty), mask=inside)
        g_next = _row(g, 0, C)
        if SUMMARY:
            factor *= tl.reduce(onward, 0, _times)
    if SUMMARY:
        at = row * tl.num_programs(0) + segment
        tl.store(ends + at.to(tl.int64) * D + columns, g_next)
        tl.store(factors + at, factor)

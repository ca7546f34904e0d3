"""The Triton kernels of gated_scan; see triton.py for how they share the work.

A tile [C, W, D] has W pieces of C steps. It lies in registers so that each piece is a warp's, and all its steps of a column
one thread's: scans over C then are plain multiply-adds, without shuffles, shared memory or barriers. The compiler lays
tiles out so because they are read as [C, W * D], V neighbours (`_columns`) for each thread; [C, W, D] it lays out now one
way, now another.
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
    gates, decays, resets, log_scale, forgets, inputs, tops, last, words, length, heads, padded, groups,
    gate_row, gate_step, gate_head, decay_row, decay_step, decay_head, reset_row, reset_step,
    RESETS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
):
    """Of one head: M of all steps (`tops`, the one before the first step first), exp(log_decay_t + M_{t-1} - M_t)
    (`forgets`, 0 where a document starts), exp(log_gate_t - M_t) (`inputs`), and M after the last step (`last`).

    The words of the head's `groups` of stretches are zeroed, and with the last head's the ticket behind them all; see
    chained_kernels.py.
    M may be off by a rounding: it is a unit, and both factors are computed from the one that was stored. Steps past the
    end add nothing and forget nothing: their gates are -inf.
    """
    row = tl.program_id(0)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    gates += b * gate_row + h * gate_head
    decays += b * decay_row + h * decay_head
    resets += b * reset_row
    forgets += row.to(tl.int64) * (padded + C)  # one more is needed, C more keep rows aligned
    inputs += row.to(tl.int64) * padded
    tops += row.to(tl.int64) * (padded + 1)
    top = tl.load(log_scale + row) if STATE else float("-inf")
    tl.store(tops, top)
    tl.store(forgets + padded + tl.arange(0, C), tl.zeros([C], tl.float32))
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
    tl.store(last + row, top)
    words += row.to(tl.int64) * groups
    for start in range(0, groups, BLOCK):
        which = start + tl.arange(0, BLOCK)
        tl.store(words + which, tl.zeros([BLOCK], tl.int32), mask=which < groups)
    if (row + 1 == tl.num_programs(0)) & (groups > 0):
        tl.store(words + groups, 0)


@triton.jit
def _columns(D: tl.constexpr, V: tl.constexpr, W: tl.constexpr = 1):
    """The columns of a head, V neighbours for each thread, W times over."""
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, W * D) % D, V), V)


@triton.jit
def _places(C: tl.constexpr, W: tl.constexpr, MIRRORED: tl.constexpr, D: tl.constexpr = 1):
    """[C, W * D]: where the steps of a stretch of W pieces stand in it; MIRRORED counts steps and pieces from its end."""
    places = (tl.arange(0, W * D) // D)[None, :] * C + tl.arange(0, C)[:, None]
    return W * C - 1 - places if MIRRORED else places


@triton.jit
def _inside(places, t0, end, size, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr):
    """[C, W * D]: which numbers of a stretch from t0 on there are, up to the step before `end`."""
    inside = places < end - t0
    return inside if EVEN else inside & (_columns(D, V, W) < size)[None, :]


@triton.jit
def _tile(base, offsets, t0, step, inside, C: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    """Rows of a stretch from t0 on, [C, W, D], zero outside; offsets [C, W * D]: of its numbers from its first."""
    tile = tl.load(base + t0 * tl.full((), step, tl.int64) + offsets, mask=inside, other=0)
    return tl.reshape(tile, (C, W, D))


@triton.jit
def _store(base, tile, offsets, t0, step, inside, C: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    tile = tl.reshape(tile.to(base.dtype.element_ty), (C, W * D))
    tl.store(base + t0 * tl.full((), step, tl.int64) + offsets, tile, mask=inside)


@triton.jit
def _factors(base, places, t0, end, other: tl.constexpr):
    """[C, W]: a factor of each step of a stretch; `other` past the end."""
    return tl.load(base + t0 + places, mask=places < end - t0, other=other)


@triton.jit
def _row(tile, which: tl.constexpr, C: tl.constexpr):
    """[W, D]: one step of each piece of a tile; each thread has its columns' steps, so nothing is computed."""
    return tl.sum(tl.where((tl.arange(0, C) == which)[:, None, None], tile, 0.0), 0)


@triton.jit
def _first(x, W: tl.constexpr):
    """[D]: what the first of W pieces has in x [W, D]."""
    return tl.sum(tl.where(tl.arange(0, W)[:, None] == 0, x, 0.0), 0)


@triton.jit
def _sums(x, factor, arriving, C: tl.constexpr, W: tl.constexpr, D: tl.constexpr):
    """The recurrence s_c = factor_c s_{c-1} + x_c of a stretch, piece after piece: (s [C, W, D], what comes to each piece
    [W, D], what comes to the first piece of the next stretch).

    x: [C, W, D]; factor: [C, W]; arriving: [W, D], whose first row comes to the first piece.
    Each warp sums up its piece from nothing; then the last sums of all are summed, and what comes to each is added.
    """
    first = tl.arange(0, W)[:, None] == 0
    factor = tl.broadcast_to(factor[:, :, None], x.shape)
    if W == 1:
        x += tl.where((tl.arange(0, C) == 0)[:, None, None], factor * arriving[None, :, :], 0.0)
        s = tl.associative_scan((factor, x), 0, _recur)[1]
        return s, arriving, _row(s, C - 1, C)
    kept, s = tl.associative_scan((factor, x), 0, _recur)
    kept_of_piece, last = _row(kept, C - 1, C), _row(s, C - 1, C)
    last += tl.where(first, kept_of_piece * arriving, 0.0)
    last = tl.associative_scan((kept_of_piece, last), 0, _recur)[1]
    before = tl.broadcast_to(((tl.arange(0, W) + W - 1) % W)[:, None], (W, D))
    passed = tl.gather(last, before, 0)
    arriving = tl.where(first, arriving, passed)
    return s + kept * arriving[None, :, :], arriving, passed


@triton.jit
def _sums_mirrored(x, factor, u_in, C: tl.constexpr):
    """u of all steps of mirrored pieces: u_c = factor_c u_{c+1} + x_c from u_in [W, D], which comes to each piece. Written
    out, for a reverse scan shuffles."""
    steps, factor = tl.arange(0, C)[:, None, None], tl.broadcast_to(factor[:, :, None], x.shape)
    all_u = x + tl.where(steps == C - 1, factor * u_in[None, :, :], 0.0)
    u = _row(all_u, C - 1, C)
    for back in tl.static_range(1, C):
        u = _row(x, C - 1 - back, C) + _row(factor, C - 1 - back, C) * u
        all_u = tl.where(steps == C - 1 - back, u[None, :, :], all_u)
    return all_u


@triton.jit
def _decay_gradients(for_gate, forget, arriving, C: tl.constexpr):
    """Gradients of the decays of mirrored pieces, g_t . forget_t u_{t-1}. Since keys do not change with the length of u_t,
    what reaches u_t from its own key is orthogonal to it, and so g_t . u_t = forget_{t+1} g_{t+1} . u_t: the next step's
    gradient, from which the gate's g_t . input_t k~_t goes off. `arriving` [W] is that of the step after each piece."""
    found = arriving[None, :] - tl.cumsum(for_gate, 0)
    return tl.where(forget == 0, 0.0, found)


@triton.jit
def summary_kernel(
    raw, forgets, inputs, vectors, factors, length, heads, size, raw_row, raw_step, raw_head, per_segment, LENGTH,
    EVEN: tl.constexpr, C: tl.constexpr, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):
    """What a segment adds to the state: u at its end when it starts from nothing, and the factor of the state that it
    starts from."""
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    chunks = tl.cdiv(length, C)
    raw += b * raw_row + h * raw_head
    forgets += row.to(tl.int64) * (chunks + 1) * C
    inputs += row.to(tl.int64) * chunks * C
    places, spread = _places(C, W, False), _places(C, W, False, D)
    offsets = spread * raw_step + _columns(D, V, W)[None, :]
    arriving = tl.zeros([W, D], tl.float32)
    kept = tl.full([W], 1.0, tl.float32)
    first = segment * per_segment * C
    last = tl.minimum(first + per_segment * C, chunks * C)
    end = tl.minimum(last, length)
    for t0 in range(first, last, W * C):
        inside = _inside(spread, t0, end, size, W, D, V, EVEN)
        tile = _tile(raw, offsets, t0, raw_step, inside, C, W, D)
        forget, weight = _factors(forgets, places, t0, last, 1.0), _factors(inputs, places, t0, last, 0.0)
        _, _, arriving = _sums(tile.to(tl.float32) * weight[:, :, None], forget, arriving, C, W, D)
        kept *= tl.reduce(forget, 0, _times)
    at = row * tl.num_programs(0) + segment
    tl.store(vectors + at.to(tl.int64) * D + _columns(D, V), _first(arriving, W))
    tl.store(factors + at, tl.reduce(kept, 0, _times))


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
    C: tl.constexpr, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):
    """Keys of one segment of one head; the last segment's program also writes the state after the last step."""
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    columns = _columns(D, V)
    chunks = tl.cdiv(length, C)
    raw += b * raw_row + h * raw_head
    keys += (b * length * heads + h) * size
    forgets += row.to(tl.int64) * (chunks + 1) * C
    inputs += row.to(tl.int64) * chunks * C
    entries += row.to(tl.int64) * chunks * size
    inverses += row.to(tl.int64) * chunks * C
    u_in = tl.zeros([D], tl.float32)
    if STATE:
        u_in = tl.load(vector + row.to(tl.int64) * size + columns, mask=columns < size, other=0.0)
    if SEGMENTS:
        at = row.to(tl.int64) * tl.num_programs(0)
        u_in = _entry(vectors + at * D, factors + at, u_in, segment, D, V)
    places, spread, spread_columns = _places(C, W, False), _places(C, W, False, D), _columns(D, V, W)
    offsets = spread * raw_step + spread_columns[None, :]
    key_offsets = spread * (heads * size) + spread_columns[None, :]
    pieces = tl.arange(0, W * D) // D
    entry_offsets = pieces * size + spread_columns
    arriving = tl.broadcast_to(u_in[None, :], (W, D))
    first = segment * per_segment * C
    last = tl.minimum(first + per_segment * C, chunks * C)
    end = tl.minimum(last, length)
    for t0 in range(first, last, W * C):
        inside = _inside(spread, t0, end, size, W, D, V, EVEN)
        tile = _tile(raw, offsets, t0, raw_step, inside, C, W, D)
        forget, weight = _factors(forgets, places, t0, last, 1.0), _factors(inputs, places, t0, last, 0.0)
        u, entry, arriving = _sums(tile.to(tl.float32) * weight[:, :, None], forget, arriving, C, W, D)
        square = tl.sum(u * u, 2)
        inverse = tl.where(square == 0, 0.0, tl.rsqrt(square))
        if KEEP:
            there = (pieces * C < last - t0) & (spread_columns < size)
            tl.store(entries + t0 // C * size + entry_offsets, tl.reshape(entry, (W * D,)), mask=there)
            tl.store(inverses + t0 + places, inverse, mask=places < last - t0)
        _store(keys, u * inverse[:, :, None], key_offsets, t0, heads * size, inside, C, W, D)
    if last == chunks * C:
        tl.store(new_vector + row.to(tl.int64) * size + columns, _first(arriving, W), mask=columns < size)


@triton.jit
def backward_kernel(
    grad, raw, forgets, inputs, entries, inverses, grad_raw, grad_gates, grad_decays, ends, factors,
    length, heads, size, grad_row, grad_step, grad_head, raw_row, raw_step, raw_head, per_segment, LENGTH,
    SUMMARY: tl.constexpr, SEGMENTS: tl.constexpr, EVEN: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):
    """Gradients of one segment of one head, walked backwards: g_t = direct_t + forget_{t+1} g_{t+1} for u_t. Tiles are
    mirrored, their first row is a piece's last step, so that g is summed as u is in the forward pass.

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
    forgets += row.to(tl.int64) * (chunks + 1) * C
    inputs += row.to(tl.int64) * chunks * C
    entries += row.to(tl.int64) * chunks * size
    inverses += row.to(tl.int64) * chunks * C
    g_next, factor = tl.zeros([D], tl.float32), 1.0
    if SEGMENTS and not SUMMARY:
        at = row.to(tl.int64) * tl.num_programs(0)
        for r in range(segment + 1, tl.num_programs(0)):
            g_next += factor * tl.load(ends + (at + r) * D + columns)
            factor *= tl.load(factors + at + r)
    places, spread, spread_columns = _places(C, W, True), _places(C, W, True, D), _columns(D, V, W)
    offsets = spread * raw_step + spread_columns[None, :]
    grad_offsets = spread * grad_step + spread_columns[None, :]
    key_offsets = spread * (heads * size) + spread_columns[None, :]
    pieces = W - 1 - tl.arange(0, W * D) // D
    entry_offsets = pieces * size + spread_columns
    arriving, kept = tl.broadcast_to(g_next[None, :], (W, D)), tl.full([W], 1.0, tl.float32)
    first = segment * per_segment * C
    last = tl.minimum(first + per_segment * C, chunks * C)
    end = tl.minimum(last, length)
    for back in range(0, last - first, W * C):
        t0 = first + (last - first - 1) // (W * C) * (W * C) - back
        inside = _inside(spread, t0, end, size, W, D, V, EVEN)
        tile = _tile(raw, offsets, t0, raw_step, inside, C, W, D)
        upstream = _tile(grad, grad_offsets, t0, grad_step, inside, C, W, D)
        forget, weight = _factors(forgets, places, t0, last, 1.0), _factors(inputs, places, t0, last, 0.0)
        onward, inverse = _factors(forgets + 1, places, t0, last, 1.0), _factors(inverses, places, t0, last, 0.0)
        there = (pieces * C < last - t0) & (spread_columns < size)
        u_in = tl.reshape(tl.load(entries + t0 // C * size + entry_offsets, mask=there, other=0.0), (W, D))
        x, upstream = tile.to(tl.float32) * weight[:, :, None], upstream.to(tl.float32)
        u = _sums_mirrored(x, forget, u_in, C)
        along = tl.sum(u * upstream, 2) * inverse * inverse
        direct = (upstream - u * along[:, :, None]) * inverse[:, :, None]
        g, g_after, arriving = _sums(direct, onward, arriving, C, W, D)
        if SUMMARY:
            kept *= tl.reduce(onward, 0, _times)
        else:
            _store(grad_raw, g * weight[:, :, None], key_offsets, t0, heads * size, inside, C, W, D)
            for_gate = tl.sum(g * x, 2)
            onward_last = tl.sum(tl.where(tl.arange(0, C)[:, None] == 0, onward, 0.0), 0)
            for_next = tl.sum(g_after * _row(u, 0, C), 1) * onward_last
            for_decay = _decay_gradients(for_gate, forget, for_next, C)
            at_steps = (t0 + places).to(tl.int64) * heads
            tl.store(grad_gates + at_steps, for_gate.to(grad_gates.dtype.element_ty), mask=places < end - t0)
            tl.store(grad_decays + at_steps, for_decay.to(grad_decays.dtype.element_ty), mask=places < end - t0)
    if SUMMARY:
        at = row * tl.num_programs(0) + segment
        tl.store(ends + at.to(tl.int64) * D + columns, _first(arriving, W))
        tl.store(factors + at, tl.reduce(kept, 0, _times))

"""The scans of gated_scan in Triton; see triton.py, and triton_tiles.py for how tiles lie in registers.

A program has one stretch, a tile, of one head, in registers from its loading to its storing. It sums up its stretch from
nothing, and what enters the stretch comes from the programs before it through memory: a scan in one pass, a chain in a fixed
order (Merrill and Garland's decoupled look-back takes what is there first, and rounds otherwise each time).

Stretches are numbered along the chain, backwards in time for gradients, and GROUP of them make a group, which has a word:

    bit r < GROUP    the r-th stretch of the group has left what it adds to the state ([D], `sums`) and the factor of the
                     state that enters it (`factors`)
    bit GROUP        the state that enters the group is there ([D], `states`)

A stretch that finds the bits of all before it in its group folds their sums in their order; only the group's last waits
for the state that enters the group and has the next group wait for it. With GROUP = 1 there is nothing to fold, and every
stretch waits for the one before.

Waiting ends because a program waits only for programs of lower numbers, and takes its number when it starts: those are
resident or done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmcore.kernels.gated_scan.triton_tiles import columns_of, places_of, row_of


@triton.jit
def _recur(forget_a, u_a, forget_b, u_b):
    """u after two stretches of steps, of which the second keeps forget_b of what came before."""
    return forget_a * forget_b, u_a * forget_b + u_b


@triton.jit
def _times(a, b):
    return a * b


@triton.jit
def _inside(places, t0, end, size, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr):
    """[C, W * D]: which numbers of a stretch from t0 on there are, up to the step before `end`."""
    inside = places < end - t0
    return inside if EVEN else inside & (columns_of(D, V, W) < size)[None, :]


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
def _number(words, rows, groups):
    """Which program this is: programs of lower numbers have started."""
    return tl.atomic_add(words + tl.full((), rows, tl.int64) * groups, 1, sem="relaxed")


@triton.jit
def _publish(word, bit):
    """Let others see what this program stored before."""
    tl.debug_barrier()
    tl.atomic_add(word, bit, sem="release")


@triton.jit
def _wait(word, bits):
    """Return when others have published all of `bits`."""
    found = tl.atomic_add(word, 0, sem="acquire")
    while (found & bits) != bits:
        found = tl.atomic_add(word, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _laid_out(x, like):
    """x in the layout of `like` [C, W, D]: a choice whose outcome the compiler knows once layouts are chosen. What it finds
    no reason to lay out as a tile it lays out another way, and converts it step by step."""
    return tl.where((tl.arange(0, like.shape[0]) < like.shape[0])[:, None, None], x, like)


@triton.jit
def _from_nothing(x, factor):
    """s_c = factor_c s_{c-1} + x_c of each piece from s = 0, and the factor of what would have come to the piece: both
    [C, W, D]. x: [C, W, D]; factor: [C, W]."""
    return tl.associative_scan((tl.broadcast_to(factor[:, :, None], x.shape), x), 0, _recur)


@triton.jit
def _back_from_nothing(x, factor, C: tl.constexpr):
    """g_c = x_c + factor_c g_{c+1} of each piece from g = 0 after it, and the factor of what would have come to it: both
    [C, W, D]. x: [C, W, D]; factor: [C, W]. Written out, for a reverse scan shuffles."""
    steps = tl.arange(0, C)[:, None, None]
    factor = _laid_out(factor[:, :, None], x)
    g, kept = row_of(x, C - 1, C), row_of(factor, C - 1, C)
    all_g, all_kept = x, factor
    for back in tl.static_range(1, C):
        onward = row_of(factor, C - 1 - back, C)
        g, kept = row_of(x, C - 1 - back, C) + onward * g, onward * kept
        here = steps == C - 1 - back
        all_g, all_kept = tl.where(here, g[None, :, :], all_g), tl.where(here, kept[None, :, :], all_kept)
    return all_kept, all_g


@triton.jit
def _come(kept, last, start, position, positions, words, sums, factors, states,
          GROUP: tl.constexpr, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """(what comes to each piece of a stretch [W, D], what leaves the stretch: the first row of [W, D]), from what each piece
    ends with when nothing comes to it, `last`, and the factor of what does, `kept`; both [W, D].

    start [W, D]: what comes to the first stretch. words, sums, factors, states: those of the head.
    """
    pieces, columns = tl.arange(0, W)[:, None], tl.broadcast_to(columns_of(D, V)[None, :], (W, D))
    first = pieces == 0
    if W > 1:
        # What the pieces before each end with; the first row gets that of all.
        kept, last = tl.associative_scan((kept, last), 0, _recur)
        before = tl.broadcast_to((pieces + W - 1) % W, (W, D))
        kept, last = tl.gather(kept, before, 0), tl.gather(last, before, 0)
    group, place = position // GROUP, position % GROUP
    if GROUP > 1:
        tl.store(sums + position * D + columns, last, mask=first)
        tl.store(factors + position + columns * 0, kept, mask=first & (columns == 0))
        _publish(words + group, 1 << place)
        members = tl.arange(0, GROUP)
        earlier = members < place
        if place > 0:
            _wait(words + group, (1 << place) - 1)
        # Past L1, which is not coherent.
        factor = tl.load(factors + group * GROUP + members, mask=earlier, other=1.0, cache_modifier=".cg")
        sum_places = (group * GROUP + members)[:, None] * D + columns_of(D, V)[None, :]
        each = tl.load(sums + sum_places, mask=earlier[:, None], other=0.0, cache_modifier=".cg")
        onward = tl.reduce(tl.where(members[None, :] > members[:, None], factor[None, :], 1.0), 1, _times)
        folded, weight = tl.sum(each * onward[:, None], 0), tl.reduce(factor, 0, _times)
    arriving = start
    if group > 0:
        _wait(words + group, 1 << GROUP)
        arriving = tl.load(states + group * D + columns, cache_modifier=".cg")
    if GROUP > 1:
        arriving = folded[None, :] + weight * arriving
    leaving = last + kept * arriving
    if (place == GROUP - 1) & (position + 1 < positions):
        tl.store(states + (group + 1) * D + columns, leaving, mask=first)
        _publish(words + group + 1, 1 << GROUP)
    return tl.where(first, arriving, leaving), leaving


@triton.jit
def forward_kernel(
    raw, forgets, inputs, vector, keys, new_vector, entries, inverses, words, sums, factors, states,
    length, heads, size, rows, raw_row, raw_step, raw_head,
    STATE: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):
    """Keys of one stretch of one head; the last stretch's program also writes the state after the last step."""
    chunks = tl.cdiv(length, C)
    positions = tl.cdiv(chunks, W)
    groups = tl.cdiv(positions, GROUP)
    number = _number(words, rows, groups)
    position, row = number // rows, number % rows
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    raw += b * raw_row + h * raw_head
    keys += (b * length * heads + h) * size
    forgets += row.to(tl.int64) * (chunks + 1) * C
    inputs += row.to(tl.int64) * chunks * C
    entries += row.to(tl.int64) * chunks * size
    inverses += row.to(tl.int64) * chunks * C
    t0, padded = position * W * C, chunks * C
    places, spread, spread_columns = places_of(C, W), places_of(C, W, D), columns_of(D, V, W)
    inside = _inside(spread, t0, length, size, W, D, V, EVEN)
    tile = _tile(raw, spread * raw_step + spread_columns[None, :], t0, raw_step, inside, C, W, D)
    forget, weight = _factors(forgets, places, t0, padded, 1.0), _factors(inputs, places, t0, padded, 0.0)
    columns = tl.broadcast_to(columns_of(D, V)[None, :], (W, D))
    start = tl.zeros([W, D], tl.float32)
    if STATE:
        start = tl.load(vector + row.to(tl.int64) * size + columns, mask=columns < size, other=0.0)
    kept, s = _from_nothing(tile.to(tl.float32) * weight[:, :, None], forget)
    at = row.to(tl.int64) * positions
    entry, leaving = _come(
        row_of(kept, C - 1, C), row_of(s, C - 1, C), start, position, positions, words + row.to(tl.int64) * groups,
        sums + at * D, factors + at, states + row.to(tl.int64) * groups * D, GROUP, W, D, V,
    )
    u = s + kept * entry[None, :, :]
    square = tl.sum(u * u, 2)
    inverse = tl.where(square == 0, 0.0, tl.rsqrt(square))
    if KEEP:
        pieces = tl.arange(0, W * D) // D
        there = (pieces * C < padded - t0) & (spread_columns < size)
        tl.store(entries + t0 // C * size + pieces * size + spread_columns, tl.reshape(entry, (W * D,)), mask=there)
        tl.store(inverses + t0 + places, inverse, mask=places < padded - t0)
    key_offsets = spread * (heads * size) + spread_columns[None, :]
    _store(keys, u * inverse[:, :, None], key_offsets, t0, heads * size, inside, C, W, D)
    if position + 1 == positions:
        one = (tl.arange(0, W)[:, None] == 0) & (columns < size)
        tl.store(new_vector + row.to(tl.int64) * size + columns, leaving, mask=one)


@triton.jit
def backward_kernel(
    grad, raw, forgets, inputs, entries, inverses, grad_raw, grad_gates, grad_decays, words, sums, factors, states,
    length, heads, size, rows, grad_row, grad_step, grad_head, raw_row, raw_step, raw_head,
    GROUP: tl.constexpr, EVEN: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
):
    """Gradients of one stretch of one head: g_t = direct_t + forget_{t+1} g_{t+1} for u_t, in a chain from the last stretch
    to the first. Pieces are mirrored, the first of a tile is the stretch's last; their steps are not, so that factors are
    loaded four at a time."""
    chunks = tl.cdiv(length, C)
    positions = tl.cdiv(chunks, W)
    groups = tl.cdiv(positions, GROUP)
    number = _number(words, rows, groups)
    position, row = number // rows, number % rows
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    grad += b * grad_row + h * grad_head
    raw += b * raw_row + h * raw_head
    grad_raw += (b * length * heads + h) * size
    grad_gates += b * length * heads + h
    grad_decays += b * length * heads + h
    forgets += row.to(tl.int64) * (chunks + 1) * C
    inputs += row.to(tl.int64) * chunks * C
    entries += row.to(tl.int64) * chunks * size
    inverses += row.to(tl.int64) * chunks * C
    t0, padded = (positions - 1 - position) * W * C, chunks * C
    pieces, spread_columns = W - 1 - tl.arange(0, W * D) // D, columns_of(D, V, W)
    places = (W - 1 - tl.arange(0, W))[None, :] * C + tl.arange(0, C)[:, None]
    spread = pieces[None, :] * C + tl.arange(0, C)[:, None]
    inside = _inside(spread, t0, length, size, W, D, V, EVEN)
    offsets = spread * raw_step + spread_columns[None, :]
    tile = _tile(raw, offsets, t0, raw_step, inside, C, W, D)
    upstream = _tile(grad, spread * grad_step + spread_columns[None, :], t0, grad_step, inside, C, W, D)
    forget, weight = _factors(forgets, places, t0, padded, 1.0), _factors(inputs, places, t0, padded, 0.0)
    onward, inverse = _factors(forgets + 1, places, t0, padded, 1.0), _factors(inverses, places, t0, padded, 0.0)
    there = (pieces * C < padded - t0) & (spread_columns < size)
    u_in = tl.load(entries + t0 // C * size + pieces * size + spread_columns, mask=there, other=0.0)
    u_in, upstream = tl.reshape(u_in, (W, D)), upstream.to(tl.float32)
    first = (tl.arange(0, C) == 0)[:, None]
    x = tile.to(tl.float32) * weight[:, :, None] + tl.where(first, forget, 0.0)[:, :, None] * u_in[None, :, :]
    _, u = _from_nothing(x, forget)
    along = tl.sum(u * upstream, 2) * inverse * inverse
    kept, g = _back_from_nothing((upstream - u * along[:, :, None]) * inverse[:, :, None], onward, C)
    at = row.to(tl.int64) * positions
    g_after, _ = _come(
        row_of(kept, 0, C), row_of(g, 0, C), tl.zeros([W, D], tl.float32), position, positions,
        words + row.to(tl.int64) * groups, sums + at * D, factors + at, states + row.to(tl.int64) * groups * D,
        GROUP, W, D, V,
    )
    g += kept * g_after[None, :, :]
    key_offsets = spread * (heads * size) + spread_columns[None, :]
    _store(grad_raw, g * weight[:, :, None], key_offsets, t0, heads * size, inside, C, W, D)
    for_gate = tl.sum(g * tile.to(tl.float32), 2) * weight
    # The gradient of a decay is g_t . forget_t u_{t-1}; with the gate's, g_t . input_t k~_t, it makes g_t . u_t. Keys do not
    # change with the length of u_t, so that direct_t is orthogonal to it, and g_t . u_t is the next decay's gradient. Hence
    # one product at the first step of a piece, and sums from there, which start anew with each document.
    arriving = tl.sum(row_of(g, 0, C) * u_in, 1)[None, :]
    summed = for_gate + tl.where(first, forget * arriving, 0.0)
    for_decay = tl.associative_scan((tl.where(forget == 0, 0.0, 1.0), summed), 0, _recur)[1] - for_gate
    at_steps = (t0 + places).to(tl.int64) * heads
    tl.store(grad_gates + at_steps, for_gate.to(grad_gates.dtype.element_ty), mask=places < length - t0)
    tl.store(grad_decays + at_steps, for_decay.to(grad_decays.dtype.element_ty), mask=places < length - t0)

"""The log-maxima of gated_scan in Triton, and the factors of its steps; see triton.py.

A tile [C, W, H] here has W segments of C steps of H heads. Heads are side by side in memory: a program for each single head,
as it was before, took 26 us of the 242 of a scan of 256 heads, for it had sectors of 32 bytes read for 2 of them. Blocks of
steps are summed up, and then each folds those before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmcore.kernels.gated_scan.triton_tiles import columns_of, places_of, row_of


@triton.jit
def _after(sum_a, top_a, sum_b, top_b):
    """The log-maximum after two stretches of steps, of which the second decays what came before by sum_b."""
    return sum_a + sum_b, tl.maximum(top_a + sum_b, top_b)


@triton.jit
def _heads_of(H: tl.constexpr, W: tl.constexpr):
    """[1, W * H]: this program's heads, two neighbours for each thread where there are two."""
    return (tl.program_id(1) * H + columns_of(H, 2 if H > 1 else 1, W))[None, :]


@triton.jit
def _logarithms(
    gates, decays, resets, b, block, length, heads, gate_row, gate_step, gate_head, decay_row, decay_step, decay_head,
    reset_row, reset_step, RESETS: tl.constexpr, C: tl.constexpr, W: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """log_decay, -inf where a document starts, and log_gate of a block of W segments of C steps, [C, W, H] in fp32. Steps
    past the end add nothing and forget nothing."""
    places, heads_at = places_of(C, W, H), _heads_of(H, W)
    first = block * tl.full((), W * C, tl.int64)
    inside = (places < length - block * W * C) & (heads_at < heads)
    at, wide = first + places, heads_at.to(tl.int64)
    gate = tl.load(gates + b * gate_row + at * gate_step + wide * gate_head, mask=inside, other=float("-inf"))
    decay = tl.load(decays + b * decay_row + at * decay_step + wide * decay_head, mask=inside, other=0).to(tl.float32)
    decay, gate = tl.reshape(decay, (C, W, H)), tl.reshape(gate.to(tl.float32), (C, W, H))
    if RESETS:
        each = places_of(C, W)
        reset = tl.load(resets + b * reset_row + (first + each) * reset_step, mask=each < length - block * W * C, other=0)
        decay = tl.where((reset != 0)[:, :, None], float("-inf"), decay)
    return decay, gate


@triton.jit
def _summed(decay, gate, C: tl.constexpr):
    """Sums of log_decay and log-maxima when nothing comes: after each step of its segment [C, W, H], and of the whole tile
    after each segment [W, H]."""
    total, top = tl.associative_scan((decay, gate), 0, _after)
    totals, tops = tl.associative_scan((row_of(total, C - 1, C), row_of(top, C - 1, C)), 0, _after)
    return total, top, totals, tops


@triton.jit
def _maxima(decay, gate, arriving, C: tl.constexpr, W: tl.constexpr, H: tl.constexpr):
    """M before and after each step [C, W, H], and after the last one [H], of which `arriving` [H] comes to the first. What
    leaves a segment is what enters the next, to the bit."""
    total, top, totals, tops = _summed(decay, gate, C)
    leaving = tl.maximum(tops, totals + arriving[None, :])
    segments = tl.arange(0, W)[:, None]
    entering = tl.gather(leaving, tl.broadcast_to((segments + W - 1) % W, (W, H)), 0)
    entering = tl.where(segments == 0, arriving[None, :], entering)
    steps = tl.arange(0, C)[:, None, None]
    after = tl.where(steps == C - 1, leaving[None, :, :], tl.maximum(top, total + entering[None, :, :]))
    before = tl.broadcast_to(entering[None, :, :], (C, W, H))
    for c in tl.static_range(1, C):
        before = tl.where(steps == c, row_of(after, c - 1, C)[None, :, :], before)
    return before, after, row_of(leaving, W - 1, W)


@triton.jit
def summarize_kernel(
    gates, decays, resets, sums, tops, length, heads,
    gate_row, gate_step, gate_head, decay_row, decay_step, decay_head, reset_row, reset_step,
    RESETS: tl.constexpr, C: tl.constexpr, W: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Of each block of W * C steps the sum of log_decay (`sums`) and the log-maximum after it when nothing comes to it
    (`tops`), both [B, blocks, heads]."""
    blocks = tl.cdiv(length, W * C)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    decay, gate = _logarithms(
        gates, decays, resets, b, block, length, heads, gate_row, gate_step, gate_head, decay_row, decay_step,
        decay_head, reset_row, reset_step, RESETS, C, W, H,
    )
    _, _, total, top = _summed(decay, gate, C)
    heads_at = tl.program_id(1) * H + tl.arange(0, H)
    at = (b * blocks + block) * heads + heads_at
    tl.store(sums + at, row_of(total, W - 1, W), mask=heads_at < heads)
    tl.store(tops + at, row_of(top, W - 1, W), mask=heads_at < heads)


@triton.jit
def _around(sums, tops, arriving, block, blocks, heads, F: tl.constexpr, W: tl.constexpr, H: tl.constexpr):
    """M before and after a block, [H]; `arriving` is M before the first. sums, tops: those of the batch row.

    Every program folds the blocks in one order, W * F at a time, so that what leaves one block is what enters the next.
    """
    heads_at = _heads_of(H, W)
    entering, leaving = arriving, arriving
    for start in range(0, block + 1, W * F):
        which = start + places_of(F, W, H)
        inside = (which < blocks) & (heads_at < heads)
        total = tl.load(sums + which * heads + heads_at, mask=inside, other=0.0)
        top = tl.load(tops + which * heads + heads_at, mask=inside, other=float("-inf"))
        before, after, arriving = _maxima(tl.reshape(total, (F, W, H)), tl.reshape(top, (F, W, H)), arriving, F, W, H)
        here = start + tl.arange(0, W)[None, :, None] * F + tl.arange(0, F)[:, None, None] == block
        if block < start + W * F:
            entering = tl.sum(tl.sum(tl.where(here, before, 0.0), 0), 0)
            leaving = tl.sum(tl.sum(tl.where(here, after, 0.0), 0), 0)
    return entering, leaving


@triton.jit
def prepare_kernel(
    gates, decays, resets, log_scale, sums, tops, forgets, inputs, last, words, length, heads, padded, zeros,
    gate_row, gate_step, gate_head, decay_row, decay_step, decay_head, reset_row, reset_step,
    RESETS: tl.constexpr, STATE: tl.constexpr, MANY: tl.constexpr,
    C: tl.constexpr, F: tl.constexpr, W: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Of a block of W * C steps of H heads, with the log-maxima M: exp(log_decay_t + M_{t-1} - M_t) (`forgets`, 0 where a
    document starts), exp(log_gate_t - M_t) (`inputs`), and M after the last step (`last`). MANY: there is more than one
    block, and `sums` and `tops` are what summarize_kernel has found.

    M may be off by a rounding: it is a unit, and both factors are computed from the same one. The `zeros` words of all
    stretches and the ticket are zeroed.
    """
    blocks = tl.cdiv(length, W * C)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    heads_at = tl.program_id(1) * H + tl.arange(0, H)
    there, row = heads_at < heads, b * heads + heads_at
    decay, gate = _logarithms(
        gates, decays, resets, b, block, length, heads, gate_row, gate_step, gate_head, decay_row, decay_step,
        decay_head, reset_row, reset_step, RESETS, C, W, H,
    )
    entering = tl.load(log_scale + row, mask=there, other=0.0) if STATE else tl.full([H], float("-inf"), tl.float32)
    leaving = entering
    if MANY:
        at = b * blocks * heads
        entering, leaving = _around(sums + at, tops + at, entering, block, blocks, heads, F, W, H)
    before, after, found = _maxima(decay, gate, entering, C, W, H)
    if MANY:
        ends = (tl.arange(0, C)[:, None, None] == C - 1) & (tl.arange(0, W)[None, :, None] == W - 1)
        after = tl.where(ends, leaving[None, None, :], after)
    else:
        leaving = found
    steps = block * W * C + tl.arange(0, W)[None, :, None] * C + tl.arange(0, C)[:, None, None]
    wide, inside = row[None, None, :], (steps < padded) & there[None, None, :]
    tl.store(forgets + wide * (padded + C) + steps, tl.exp(decay + (before - after)), mask=inside)
    tl.store(inputs + wide * padded + steps, tl.exp(gate - after), mask=inside)
    if block + 1 == blocks:
        tl.store(last + row, leaving, mask=there)
        beyond = row[None, :] * (padded + C) + padded + tl.arange(0, C)[:, None]  # one is needed, C keep rows aligned
        tl.store(forgets + beyond, tl.zeros([C, H], tl.float32), mask=tl.broadcast_to(there[None, :], (C, H)))
    programs = tl.num_programs(0) * tl.num_programs(1)
    each = tl.cdiv(zeros, programs)
    begin = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * each
    end = tl.minimum(begin + each, zeros)
    for start in range(begin, end, W * H):
        word = start + tl.arange(0, W * H)
        tl.store(words + word, tl.zeros([W * H], tl.int32), mask=word < end)

"""The gated scan in Triton: one pass over memory each way.

A program holds a chunk of C steps of one head, all D of it (the norm needs them), and turns it into keys with one
triangular product on the tensor cores:

    u_i = sum_{j < i} exp(log_gate_j + S_ji - M_i) k~_j + exp(log_gate_i - M_i) k~_i + exp(S_i + M_in - M_i) u_in

with S_ji the sum of the decays after j up to i. A document that starts inside the chunk closes the pairs (j, i) that
straddle it. The state (u, M) goes from chunk to chunk.

Traffic. With `segments` = 1 a program walks all chunks of a head: k~ is read once, keys are written once, and the
backward pass reads k~ and the upstream gradient once and writes one gradient. Beside them go gates and decays (2 / D
of it) and the state that enters each chunk, kept for the backward pass in fp32 (1 / 32 of bf16 keys at C = 64); u and
norms are computed again from k~, exactly, where rounded keys would spoil small gradients. B * H programs with loads in
flight ahead fill a card from about one program for two multiprocessors on. Fewer heads than that, or a very long text,
are cut in time into segments: a pass before sums up each segment (reads k~ once more, and in the backward pass the
gradient too), and every program folds the sums of the segments before its own into the state that it starts from.
1.5 times the traffic forward and 1.67 times backward, for `segments` times the programs.

A NaN reaches every step of its chunk (0 times NaN). Decays below -4000 count as -4000.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import registry, tuning

CHUNK = 64
MOST_SEGMENTS = 64
WAVES = 2  # programs for each multiprocessor that the cut into segments aims at


@triton.jit
def _steps(gates, decays, resets, t0, length, gate_step, decay_step, reset_step, RESETS: tl.constexpr, C: tl.constexpr):
    """Gates [C] of the steps from t0 on, running sums of the decays in two parts, and the number of resets so far.

    Differences of running sums must not lose small decays behind a large one: the coarse part holds multiples of 1/64,
    whose sums are exact up to 2^18, and the fine part stays below 1/2. Steps past the end add nothing and forget
    nothing, so that the last state passes through them.
    """
    steps = t0 + tl.arange(0, C)
    inside = steps < length
    gate = tl.load(gates + steps.to(tl.int64) * gate_step, mask=inside, other=float("-inf")).to(tl.float32)
    decay = tl.load(decays + steps.to(tl.int64) * decay_step, mask=inside, other=0).to(tl.float32)
    decay = tl.maximum(decay, -4000.0)
    if RESETS:
        reset = tl.load(resets + steps.to(tl.int64) * reset_step, mask=inside, other=0).to(tl.int32)
        decay = tl.where(reset != 0, 0.0, decay)
        document = tl.cumsum(reset, 0)
    else:
        document = tl.zeros([C], tl.int32)
    coarse = tl.floor(decay * 64 + 0.5) / 64
    return gate, tl.cumsum(coarse, 0), tl.cumsum(decay - coarse, 0), document


@triton.jit
def _last(x, C: tl.constexpr):
    """The last number of x [C]."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, tl.zeros([C], x.dtype)), 0)


@triton.jit
def _weights(gate, coarse, fine, document, top_in, C: tl.constexpr):
    """Of a chunk entered at the log-scale top_in: M [C], the logarithms S_ji of the decays between two steps in a
    triangle [i, j] (-inf outside), and the weights of the entering state [C] as logarithms."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    open_ = (i >= j) & (document[:, None] == document[None, :])
    between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    between = tl.where(open_, between, float("-inf"))
    carried = tl.where(document == 0, coarse + fine + top_in, float("-inf"))
    top = tl.maximum(tl.max(between + gate[None, :], 1), carried)
    return top, between, carried - top


@triton.jit
def _product(weights, tile, PRECISION: tl.constexpr):
    """weights [I, J] in fp32 times tile [J, D]. A 16-bit tile is multiplied as it is, with the weights in two parts of
    its format: as exact as 2^-17 (bf16), from the tile's place in shared memory, on the fast tensor cores."""
    if tile.dtype == tl.float32:
        return tl.dot(weights, tile, input_precision=PRECISION)
    high = weights.to(tile.dtype)
    low = (weights - high.to(tl.float32)).to(tile.dtype)
    return tl.dot(low, tile, tl.dot(high, tile))


@triton.jit
def _product_of_two(weights, direct, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """weights [I, J] times direct [J, D], both fp32: for bf16 in two parts each, without the smallest product."""
    if dtype != tl.bfloat16:  # fp16 has not the range
        return tl.dot(weights, direct, input_precision=PRECISION)
    high = direct.to(dtype)
    low = (direct - high.to(tl.float32)).to(dtype)
    return tl.dot(weights.to(dtype), low, _product(weights, high, PRECISION))


@triton.jit
def _tile(base, t0, length, step, size, C: tl.constexpr, D: tl.constexpr):
    """Rows t0 .. t0 + C - 1 of a head at `base`, [C, D], zero outside."""
    rows = t0 + tl.arange(0, C)
    columns = tl.arange(0, D)
    inside = (rows < length)[:, None] & (columns < size)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * step + columns[None, :], mask=inside, other=0)


@triton.jit
def _store_tile(base, tile, t0, length, step, size, C: tl.constexpr, D: tl.constexpr):
    rows = t0 + tl.arange(0, C)
    columns = tl.arange(0, D)
    inside = (rows < length)[:, None] & (columns < size)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * step + columns[None, :], tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _entry(vectors, tops, sums, cuts, vector, top, segment, S: tl.constexpr, D: tl.constexpr):
    """The state that enters `segment`: the initial one and the sums of the segments before, folded."""
    r = tl.arange(0, S)
    columns = tl.arange(0, D)
    before = r < segment
    following = r + 1 < segment
    after = tl.cumsum(tl.load(sums + r + 1, mask=following, other=0.0), 0, reverse=True)
    cut = tl.cumsum(tl.load(cuts + r + 1, mask=following, other=0), 0, reverse=True)
    logs = tl.load(tops + r, mask=before, other=float("-inf")) + after
    logs = tl.where(before & (cut == 0), logs, float("-inf"))
    all_sum = tl.sum(tl.load(sums + r, mask=before, other=0.0), 0)
    all_cut = tl.sum(tl.load(cuts + r, mask=before, other=0), 0)
    initial = tl.where(all_cut == 0, top + all_sum, float("-inf"))
    new_top = tl.maximum(tl.max(logs, 0), initial)
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)
    parts = tl.load(vectors + r[:, None] * D + columns[None, :], mask=before[:, None], other=0.0)
    folded = tl.sum(parts * tl.exp(logs - finite)[:, None], 0)
    return folded + vector * tl.exp(initial - finite), new_top


@triton.jit
def _summary_kernel(
    raw, gates, decays, resets, vectors, tops, sums, cuts, length, heads, size,
    raw_row, raw_step, raw_head, gate_row, gate_step, gate_head, decay_row, decay_step, decay_head,
    reset_row, reset_step, per_segment, LENGTH,
    RESETS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):
    """What a segment adds to the state: u and M at its end when it starts from nothing, and its decay."""
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    raw += b * raw_row + h * raw_head
    gates += b * gate_row + h * gate_head
    decays += b * decay_row + h * decay_head
    resets += b * reset_row
    u = tl.zeros([D], tl.float32)
    top_in = float("-inf")
    total = 0.0
    cut = 0
    first = segment * per_segment
    for n in range(first, tl.minimum(first + per_segment, tl.cdiv(length, C))):
        t0 = n * C
        gate, coarse, fine, document = _steps(
            gates, decays, resets, t0, length, gate_step, decay_step, reset_step, RESETS, C
        )
        end_coarse, end_fine, end_document = _last(coarse, C), _last(fine, C), _last(document, C)
        logs = tl.where(document == end_document, gate + ((end_coarse - coarse) + (end_fine - fine)), float("-inf"))
        carried = tl.where(end_document == 0, end_coarse + end_fine + top_in, float("-inf"))
        top = tl.maximum(tl.max(logs, 0), carried)
        tile = _tile(raw, t0, length, raw_step, size, C, D).to(tl.float32)
        u = tl.sum(tile * tl.exp(logs - top)[:, None], 0) + u * tl.exp(carried - top)
        top_in = top
        total += end_coarse + end_fine
        cut += end_document
    at = row * S + segment
    tl.store(vectors + at.to(tl.int64) * D + tl.arange(0, D), u)
    tl.store(tops + at, top_in)
    tl.store(sums + at, total)
    tl.store(cuts + at, cut)


@triton.jit
def _forward_kernel(
    raw, gates, decays, resets, vector, log_scale, keys, new_vector, new_log_scale, entries, entry_tops,
    vectors, tops, sums, cuts, length, heads, size, raw_row, raw_step, raw_head, gate_row, gate_step, gate_head,
    decay_row, decay_step, decay_head, reset_row, reset_step, per_segment, LENGTH,
    RESETS: tl.constexpr, STATE: tl.constexpr, KEEP: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):
    """Keys of one segment of one head; the last segment's program also writes the state after the last step."""
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    columns = tl.arange(0, D)
    chunks = tl.cdiv(length, C)
    raw += b * raw_row + h * raw_head
    gates += b * gate_row + h * gate_head
    decays += b * decay_row + h * decay_head
    resets += b * reset_row
    keys += (b * length * heads + h) * size
    entries += row.to(tl.int64) * chunks * size
    entry_tops += row.to(tl.int64) * chunks
    if STATE:
        u_in = tl.load(vector + row.to(tl.int64) * size + columns, mask=columns < size, other=0.0)
        top_in = tl.load(log_scale + row)
    else:
        u_in = tl.zeros([D], tl.float32)
        top_in = float("-inf")
    if SEGMENTS:
        at = row.to(tl.int64) * S
        u_in, top_in = _entry(vectors + at * D, tops + at, sums + at, cuts + at, u_in, top_in, segment, S, D)
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    for n in range(first, last):
        t0 = n * C
        if KEEP:
            tl.store(entries + n * size + columns, u_in, mask=columns < size)
            tl.store(entry_tops + n, top_in)
        tile = _tile(raw, t0, length, raw_step, size, C, D)
        gate, coarse, fine, document = _steps(
            gates, decays, resets, t0, length, gate_step, decay_step, reset_step, RESETS, C
        )
        top, between, carry = _weights(gate, coarse, fine, document, top_in, C)
        u = _product(tl.exp(between + (gate[None, :] - top[:, None])), tile, PRECISION)
        u += tl.exp(carry)[:, None] * u_in[None, :]
        norm = tl.sqrt(tl.sum(u * u, 1))
        inverse = tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))
        _store_tile(keys, u * inverse[:, None], t0, length, heads * size, size, C, D)
        u_in = tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], u, 0.0), 0)
        top_in = _last(top, C)
    if last == chunks:
        tl.store(new_vector + row.to(tl.int64) * size + columns, u_in, mask=columns < size)
        tl.store(new_log_scale + row, top_in)


@triton.jit
def _backward_kernel(
    grad, raw, gates, decays, resets, entries, entry_tops, grad_raw, grad_gates, grad_decays, ends, factors,
    length, heads, size, grad_row, grad_step, grad_head, raw_row, raw_step, raw_head, gate_row, gate_step, gate_head,
    decay_row, decay_step, decay_head, reset_row, reset_step, per_segment, LENGTH,
    RESETS: tl.constexpr, SUMMARY: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):
    """Gradients of one segment of one head, walked backwards.

    g, the gradient of the state after a chunk, arrives from the chunks that follow. With SUMMARY nothing is written but
    the gradient of the state before the segment when g = 0 at its end (`ends`), and the logarithm of what g would be
    multiplied with (`factors`).
    """
    segment = tl.program_id(0)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    columns = tl.arange(0, D)
    chunks = tl.cdiv(length, C)
    grad += b * grad_row + h * grad_head
    raw += b * raw_row + h * raw_head
    gates += b * gate_row + h * gate_head
    decays += b * decay_row + h * decay_head
    resets += b * reset_row
    grad_raw += (b * length * heads + h) * size
    grad_gates += b * length * heads + h
    grad_decays += b * length * heads + h
    entries += row.to(tl.int64) * chunks * size
    entry_tops += row.to(tl.int64) * chunks
    g = tl.zeros([D], tl.float32)
    factor = 0.0
    if SEGMENTS and not SUMMARY:
        at = row.to(tl.int64) * S
        r = tl.arange(0, S)
        present = (r > segment) & (r < tl.num_programs(0))
        between = (r - 1 > segment) & (r < tl.num_programs(0))
        logs = tl.cumsum(tl.load(factors + at + r - 1, mask=between, other=0.0), 0)
        parts = tl.load(ends + (at + r)[:, None] * D + columns[None, :], mask=present[:, None], other=0.0)
        g = tl.sum(parts * tl.where(present, tl.exp(logs), 0.0)[:, None], 0)
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    for back in range(0, last - first):
        n = last - 1 - back
        t0 = n * C
        tile = _tile(raw, t0, length, raw_step, size, C, D)
        upstream = _tile(grad, t0, length, grad_step, size, C, D).to(tl.float32)
        u_in = tl.load(entries + n * size + columns, mask=columns < size, other=0.0)
        top_in = tl.load(entry_tops + n)
        gate, coarse, fine, document = _steps(
            gates, decays, resets, t0, length, gate_step, decay_step, reset_step, RESETS, C
        )
        top, between, carry = _weights(gate, coarse, fine, document, top_in, C)
        own = tl.exp(gate - top)
        triangle = tl.exp(between + (top[None, :] - top[:, None]))
        below = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
        # u without the step's own raw key, which is added after: the decay's gradient needs the one without.
        past = _product(tl.where(below, triangle * own[None, :], 0.0), tile, PRECISION)
        past += tl.exp(carry)[:, None] * u_in[None, :]
        tile_fp32 = tile.to(tl.float32)
        u = past + own[:, None] * tile_fp32
        norm = tl.sqrt(tl.sum(u * u, 1))
        inverse = tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))
        key = u * inverse[:, None]
        direct = (upstream - key * tl.sum(key * upstream, 1)[:, None]) * inverse[:, None]
        if not SUMMARY:
            is_last = tl.arange(0, C) == C - 1
            to_end = tl.sum(tl.where(is_last[:, None], triangle, 0.0), 0)
            grad_u = _product_of_two(tl.trans(triangle), direct, tile.dtype, PRECISION) + to_end[:, None] * g[None, :]
            steps = t0 + tl.arange(0, C)
            inside = steps < length
            weighted = own[:, None] * grad_u
            _store_tile(grad_raw, weighted, t0, length, heads * size, size, C, D)
            at_steps = steps.to(tl.int64) * heads
            for_gate, for_decay = tl.sum(weighted * tile_fp32, 1), tl.sum(grad_u * past, 1)
            tl.store(grad_gates + at_steps, for_gate.to(grad_gates.dtype.element_ty), mask=inside)
            tl.store(grad_decays + at_steps, for_decay.to(grad_decays.dtype.element_ty), mask=inside)
        whole = _last(carry, C)
        g = tl.sum(direct * tl.exp(carry)[:, None], 0) + g * tl.exp(whole)
        factor += whole
    if SUMMARY:
        at = row * S + segment
        tl.store(ends + at.to(tl.int64) * D + columns, g)
        tl.store(factors + at, factor)


_KEY = ("LENGTH", "D", "S")


@functools.cache
def _tuned(which: str, width: int) -> tuning.Tuned:
    kernel = {"summary": _summary_kernel, "forward": _forward_kernel, "backward": _backward_kernel}[which]
    # With four warps the tiles of a backward pass at D = 128 spill a kilobyte of registers, and so do all at D = 256.
    warps = (8, 4) if width > 128 or (which == "backward" and width > 64) else (4, 8)
    stages = (3, 2) if which == "forward" and width <= 128 else (2, 1)
    choices = ((warps[0], stages[0]), (warps[1], stages[0]), (warps[0], stages[1]))
    configs = [triton.Config({}, num_warps=w, num_stages=s) for w, s in choices]
    return tuning.Tuned(kernel, configs, _KEY)


def _plan(raw: Tensor) -> tuple[int, int, int, int]:
    """(C, chunks, chunks of a segment, segments)."""
    batch, time, heads, size = raw.shape
    chunk = CHUNK if size <= 128 else min(CHUNK, 32)
    chunks = triton.cdiv(time, chunk)
    # One program for two multiprocessors keeps enough loads in flight; below that the second read pays.
    if 2 * batch * heads >= tuning.processors(raw):
        return chunk, chunks, chunks, 1
    wanted = min(MOST_SEGMENTS, triton.cdiv(WAVES * tuning.processors(raw), batch * heads))
    each = max(1, triton.cdiv(chunks, wanted))
    return chunk, chunks, each, triton.cdiv(chunks, each)


def _constants(raw: Tensor, resets: Tensor | None, chunk: int, segments: int) -> dict:
    # A product in tf32 is exact in bf16 keys and off by 2^-11 in the weights; three of them are as good as fp32.
    precision = "tf32" if raw.dtype is torch.bfloat16 else "ieee" if torch.version.hip else "tf32x3"
    return {
        "RESETS": resets is not None, "SEGMENTS": segments > 1, "PRECISION": precision, "C": chunk,
        "D": max(16, triton.next_power_of_2(raw.shape[3])), "S": triton.next_power_of_2(segments),
    }  # fmt: skip


def _strides(resets: Tensor | None, *tensors: Tensor) -> list[int]:
    found = [n for tensor in tensors for n in tensor.stride()[:3]]
    return found + (list(resets.stride()) if resets is not None else [0, 0])


def _side_by_side(x: Tensor) -> Tensor:
    """x [B, T, H, D] with the numbers of a head next to one another; a copy only where they are not."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _run(raw, gates, decays, resets, vector, log_scale, keep: bool):
    batch, time, heads, size = raw.shape
    raw = _side_by_side(raw)
    chunk, chunks, each, segments = _plan(raw)
    keys = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    fp32 = {"dtype": torch.float32, "device": raw.device}
    new_vector, new_top = torch.empty(batch, heads, size, **fp32), torch.empty(batch, heads, **fp32)
    kept = chunks if keep else 0
    entries, entry_tops = torch.empty(batch, heads, kept, size, **fp32), torch.empty(batch, heads, kept, **fp32)
    constants = _constants(raw, resets, chunk, segments)
    sums = (None, None, None, None)
    sides = (time, heads, size, *_strides(resets, raw, gates, decays), each, tuning.bucket(time))
    marks = resets if resets is None else resets.view(torch.uint8)
    place = {name: constants[name] for name in ("RESETS", "C", "D", "S")}
    width = constants["D"]
    if segments > 1:
        rows, S = batch * heads, constants["S"]
        sums = (torch.empty(rows, S, width, **fp32), torch.empty(rows, S, **fp32), torch.empty(rows, S, **fp32),
                torch.empty(rows, S, dtype=torch.int32, device=raw.device))
        _tuned("summary", width)(
            (segments, rows), raw, gates, decays, _or(marks, raw), *sums, *sides, on=raw, **place
        )
    _tuned("forward", width)(
        (segments, batch * heads), raw, gates, decays, _or(marks, raw), _or(vector, keys), _or(log_scale, keys), keys,
        new_vector, new_top, entries, entry_tops, *(_or(part, keys) for part in sums), *sides, on=raw,
        STATE=vector is not None, KEEP=keep, **constants,
    )  # fmt: skip
    return keys, new_vector, new_top, entries, entry_tops


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """`other` stands where a kernel has a pointer that it will not follow."""
    return other if tensor is None else tensor


def _fake(raw, gates, decays, resets, vector, log_scale, keep):
    batch, time, heads, size = raw.shape
    chunk = CHUNK if size <= 128 else min(CHUNK, 32)
    kept = (time + chunk - 1) // chunk if keep else 0
    fp32 = torch.float32
    return (
        raw.new_empty(raw.shape), raw.new_empty(batch, heads, size, dtype=fp32), raw.new_empty(batch, heads, dtype=fp32),
        raw.new_empty(batch, heads, kept, size, dtype=fp32), raw.new_empty(batch, heads, kept, dtype=fp32),
    )  # fmt: skip


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[3:])


def _gradients(ctx, grad, *_):
    return *_scan_backward(grad, *ctx.saved_tensors), None, None, None, None


def _run_backward(grad, raw, gates, decays, resets, entries, entry_tops):
    batch, time, heads, _ = raw.shape
    grad, raw = _side_by_side(grad), _side_by_side(raw)
    chunk, _, each, segments = _plan(raw)
    grad_raw = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    grad_gates, grad_decays = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gates, decays))
    constants = _constants(raw, resets, chunk, segments)
    width, S, rows = constants["D"], constants["S"], batch * heads
    ends, factors = (grad_raw, grad_raw)
    if segments > 1:
        ends = torch.empty(rows, S, width, dtype=torch.float32, device=raw.device)
        factors = torch.empty(rows, S, dtype=torch.float32, device=raw.device)
    marks = raw if resets is None else resets.view(torch.uint8)
    for summary in (True, False) if segments > 1 else (False,):
        _tuned("backward", width)(
            (segments, rows), grad, raw, gates, decays, marks, entries, entry_tops, grad_raw, grad_gates, grad_decays,
            ends, factors, *raw.shape[1:], *_strides(resets, grad, raw, gates, decays), each, tuning.bucket(time),
            on=raw, SUMMARY=summary, **constants,
        )  # fmt: skip
    return grad_raw, grad_gates, grad_decays


def _fake_backward(grad, raw, gates, decays, resets, entries, entry_tops):
    return raw.new_empty(raw.shape), gates.new_empty(gates.shape), decays.new_empty(decays.shape)


_scan = registry.operator(
    "gated_scan_triton(Tensor raw_keys, Tensor log_gates, Tensor log_decays, Tensor? resets, Tensor? vector, "
    "Tensor? log_scale, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_scan_backward = registry.operator(
    "gated_scan_triton_backward(Tensor grad_keys, Tensor raw_keys, Tensor log_gates, Tensor log_decays, Tensor? resets, "
    "Tensor entries, Tensor entry_tops) -> (Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


def gated_scan(
    raw_keys: Tensor,
    log_gates: Tensor,
    log_decays: Tensor,
    resets: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See `mmcore.kernels.gated_scan.gated_scan`. Sums are fp32. Raises ConfigError for fp64, which would be rounded."""
    if torch.float64 in (raw_keys.dtype, log_gates.dtype, log_decays.dtype):
        raise ConfigError("gated_scan computes in fp32 as 'triton': use implementation='blocked' for fp64")
    vector, log_scale = (None, None) if state is None else (_plain(part) for part in state)
    if raw_keys.shape[1] == 0:
        batch, _, heads, size = raw_keys.shape
        empty = raw_keys.new_zeros(batch, heads, size, dtype=torch.float32)
        none = torch.full_like(empty[..., 0], -torch.inf)
        return torch.zeros_like(raw_keys), (empty, none) if state is None else (vector.clone(), log_scale.clone())
    run = _run if registry.direct(raw_keys) else _scan
    keys, *state, _, _ = run(
        raw_keys, log_gates, log_decays, resets, vector, log_scale, torch.is_grad_enabled()
    )
    return keys, tuple(state)


def _plain(part: Tensor) -> Tensor:
    return part.detach().to(torch.float32).contiguous()

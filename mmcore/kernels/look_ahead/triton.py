"""Look-ahead values in Triton: one pass over memory each way.

Forward, a program holds C positions of one head and reads the positions one step on from the cache that the first read has
filled. Backward, W rows walk through WALK positions each: what a position has from the one before and from the one after
is in registers then, and is neither read nor computed twice (as tiles it took 54 instructions a number, so it takes 27).
The sums over positions for the two numbers of a head leave each program as partial sums, so that their order is fixed.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import registry, tuning
from mmcore.kernels.look_ahead.blocked import _fake, _keep

CHUNK = 16 if tuning.INTERPRETED else 32
WALK, WALKERS = 16, 1024  # positions of a walk; numbers that all walks of a program read at a time


@triton.jit
def _tile(base, positions, length, step, size, D: tl.constexpr):
    """Rows of a head at `base`, [C, D] in fp32; zero outside the sequence."""
    columns = tl.arange(0, D)
    inside = ((positions >= 0) & (positions < length))[:, None] & (columns < size)[None, :]
    at = base + positions.to(tl.int64)[:, None] * step + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _after(after, row, size, AFTER: tl.constexpr, D: tl.constexpr):
    """What follows the last position of a head: row `row` of `after`, or zeros."""
    columns = tl.arange(0, D)
    if AFTER:
        return tl.load(after + row.to(tl.int64) * size + columns, mask=columns < size, other=0.0).to(tl.float32)
    return tl.zeros([D], tl.float32)


@triton.jit
def _inverse(square):
    """1 / sqrt(square), 0 for 0."""
    norm = tl.sqrt(square)
    return tl.where(norm == 0, 0.0, 1.0 / tl.where(norm == 0, 1.0, norm))


@triton.jit
def _forward_kernel(
    raw, mix, scale, after, values, length, heads, size, raw_row, raw_step, raw_head, C: tl.constexpr, D: tl.constexpr,
    AFTER: tl.constexpr,
):
    positions = tl.program_id(0) * C + tl.arange(0, C)
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    columns = tl.arange(0, D)
    last = _after(after, row, size, AFTER, D)
    raw += b * raw_row + h * raw_head
    own = _tile(raw, positions, length, raw_step, size, D)
    following = _tile(raw, positions + 1, length, raw_step, size, D)
    following = tl.where((positions == length - 1)[:, None], last[None, :], following)
    m = tl.load(mix + h)
    mixed = m * own + (1 - m) * following
    out = mixed * (_inverse(tl.sum(mixed * mixed, 1)) * tl.load(scale + h))[:, None]
    at = values + ((b * length + positions)[:, None] * heads + h) * size + columns[None, :]
    inside = (positions < length)[:, None] & (columns < size)[None, :]
    tl.store(at, out.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _for_mixed(own, following, upstream, m, s):
    """Of one position of each walk: the gradient of vbar = m v~_t + (1 - m) v~_{t+1}, [W, D]; v~_t - v~_{t+1}; and how far
    the upstream gradient goes along vbar, [W]."""
    difference = own - following
    mixed = m * own + (1 - m) * following  # following + m * difference is inexact at m = 1
    inverse = _inverse(tl.sum(mixed * mixed, 1))
    along = tl.sum(upstream * mixed, 1) * inverse
    return (upstream - mixed * (along * inverse)[:, None]) * (inverse * s)[:, None], difference, along


@triton.jit
def _following(raw, positions, length, step, size, after, AFTER: tl.constexpr, D: tl.constexpr):
    """What follows these positions, [W, D]."""
    following = _tile(raw, positions + 1, length, step, size, D)
    return tl.where((positions == length - 1)[:, None], after[None, :], following) if AFTER else following


@triton.jit
def _backward_kernel(
    grad, raw, mix, scale, after, grad_raw, grad_after, partial, length, heads, size,
    grad_row, grad_step, grad_head, raw_row, raw_step, raw_head,
    C: tl.constexpr, W: tl.constexpr, D: tl.constexpr, AFTER: tl.constexpr,
):
    """partial [2, H, B, blocks]: sums over W * C positions of the gradients of mix and of scale."""
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    columns = tl.arange(0, D)
    raw += b * raw_row + h * raw_head
    grad += b * grad_row + h * grad_head
    m, s = tl.load(mix + h), tl.load(scale + h)
    last = _after(after, row, size, AFTER, D)

    # The gradient of a position's value comes from two vbar: its own, and that of the position before, where walks begin.
    positions = (tl.program_id(0) * W + tl.arange(0, W)) * C - 1
    own = _tile(raw, positions, length, raw_step, size, D)
    following = _following(raw, positions, length, raw_step, size, last, AFTER, D)
    before, _, _ = _for_mixed(own, following, _tile(grad, positions, length, grad_step, size, D), m, s)
    positions += 1
    own, following = following, _following(raw, positions, length, raw_step, size, last, AFTER, D)
    upstream = _tile(grad, positions, length, grad_step, size, D)
    for_mix, for_scale = tl.zeros([W, D], tl.float32), tl.zeros([W], tl.float32)
    for _ in tl.range(C, loop_unroll_factor=2):
        # Asked for while this position is worked on; what the last one asks for is another walk's.
        beyond = _following(raw, positions + 1, length, raw_step, size, last, AFTER, D)
        next_upstream = _tile(grad, positions + 1, length, grad_step, size, D)
        for_mixed, difference, along = _for_mixed(own, following, upstream, m, s)
        at = grad_raw + ((b * length + positions)[:, None] * heads + h) * size + columns[None, :]
        inside = (positions < length)[:, None] & (columns < size)[None, :]
        result = m * for_mixed + (1 - m) * before
        tl.store(at, result.to(grad_raw.dtype.element_ty), mask=inside)
        if AFTER:
            ends = (positions == length - 1)[:, None] & (columns < size)[None, :]
            at = grad_after + row.to(tl.int64) * size + columns[None, :] + positions[:, None] * 0
            tl.store(at, ((1 - m) * for_mixed).to(grad_after.dtype.element_ty), mask=ends)
        for_mix += tl.where(inside, for_mixed * difference, 0.0)
        for_scale += along
        own, following, upstream, before = following, beyond, next_upstream, for_mixed
        positions += 1
    rows = tl.num_programs(1)
    at = partial + (h * (rows // heads) + b) * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, tl.sum(tl.sum(for_mix, 1), 0))
    tl.store(at + rows * tl.num_programs(0), tl.sum(for_scale, 0))


_FORWARD = tuning.Tuned(_forward_kernel, [triton.Config({"C": CHUNK}, num_warps=4, num_stages=1)], ())


@functools.cache
def _backward(width: int) -> tuple[tuning.Tuned, int]:
    """The kernel, and the positions of a program: as many walks as give a thread 8 numbers of each of its positions."""
    walks = max(1, WALKERS // width)
    config = triton.Config({"C": WALK, "W": walks}, num_warps=4, num_stages=1)
    return tuning.Tuned(_backward_kernel, [config], ()), WALK * walks


def _plain(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _run(raw: Tensor, mix: Tensor, scale: Tensor, after: Tensor | None) -> Tensor:
    raw = _plain(raw)
    batch, length, heads, size = raw.shape
    values = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    if raw.numel():
        _FORWARD(
            (triton.cdiv(length, CHUNK), batch * heads), raw, mix.contiguous(), scale.contiguous(),
            raw if after is None else after.contiguous(), values, length, heads, size, *raw.stride()[:3], on=raw,
            D=triton.next_power_of_2(size), AFTER=after is not None,
        )  # fmt: skip
    return values


def _gradients(ctx, grad):
    saved = ctx.saved_tensors  # once: a recomputed block gives them once
    grad_raw, numbers, grad_after = _values_backward(grad, *saved)
    return grad_raw, *numbers.unbind(), None if saved[3] is None else grad_after


def _run_backward(grad: Tensor, raw: Tensor, mix: Tensor, scale: Tensor, after: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients of raw, of mix and scale together, fp32 [2, H], and of after; without it an empty tensor."""
    grad, raw = _plain(grad), _plain(raw)
    batch, length, heads, size = raw.shape
    grad_raw = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    grad_after = raw.new_empty(0) if after is None else torch.empty(after.shape, dtype=after.dtype, device=raw.device)
    if not raw.numel():
        return grad_raw, mix.new_zeros(2, heads), grad_after.zero_()
    width = triton.next_power_of_2(size)
    kernel, positions = _backward(width)
    blocks = triton.cdiv(length, positions)
    partial = torch.empty(2, heads, batch * blocks, dtype=torch.float32, device=raw.device)
    kernel(
        (blocks, batch * heads), grad, raw, mix.contiguous(), scale.contiguous(),
        raw if after is None else after.contiguous(), grad_raw, grad_after, partial, length, heads, size,
        *grad.stride()[:3], *raw.stride()[:3], on=raw, D=width, AFTER=after is not None,
    )  # fmt: skip
    return grad_raw, partial.sum(2), grad_after


def _fake_backward(grad, raw, mix, scale, after):
    grad_after = raw.new_empty(0) if after is None else after.new_empty(after.shape)
    return raw.new_empty(raw.shape), mix.new_empty(2, *mix.shape), grad_after


_values = registry.operator(
    "look_ahead_triton(Tensor raw_values, Tensor mix, Tensor scale, Tensor? following) -> Tensor",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_values_backward = registry.operator(
    "look_ahead_triton_backward(Tensor grad, Tensor raw_values, Tensor mix, Tensor scale, Tensor? following)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


def look_ahead(raw_values: Tensor, mix: Tensor, scale: Tensor, following: Tensor | None = None) -> Tensor:
    """See `mmcore.kernels.look_ahead.look_ahead`. Raises ConfigError for fp64, which would be rounded."""
    if torch.float64 in (raw_values.dtype, mix.dtype, scale.dtype):
        raise ConfigError("look_ahead computes in fp32 as 'triton': use implementation='blocked' for fp64")
    run = _run if registry.direct(raw_values) else _values
    return run(raw_values, mix.float(), scale.float(), following)

"""Tiles of gated_scan's Triton kernels.

A tile [C, W, D] has W pieces of C steps. It lies in registers so that each piece is a warp's, and all its steps of a column
one thread's: scans over C then are plain multiply-adds, without shuffles, shared memory or barriers. The compiler lays
tiles out so because they are read as [C, W * D], V neighbours (`columns`) for each thread; [C, W, D] it lays out now one
way, now another.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def columns_of(D: tl.constexpr, V: tl.constexpr, W: tl.constexpr = 1):
    """The columns of a head, V neighbours for each thread, W times over."""
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, W * D) % D, V), V)


@triton.jit
def places_of(C: tl.constexpr, W: tl.constexpr, D: tl.constexpr = 1):
    """[C, W * D]: where the steps of a stretch of W pieces stand in it."""
    return (tl.arange(0, W * D) // D)[None, :] * C + tl.arange(0, C)[:, None]


@triton.jit
def row_of(tile, which: tl.constexpr, C: tl.constexpr):
    """One step of all pieces, [W, D] of a tile [C, W, D], or a row of [C, D]; where each thread has its columns' steps, as
    in tiles, nothing is computed."""
    steps = tl.reshape(tl.arange(0, C), (C, 1, 1) if len(tile.shape) == 3 else (C, 1))
    return tl.sum(tl.where(steps == which, tile, 0.0), 0)

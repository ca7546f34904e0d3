"""What the Triton kernels of memory_read share: intervals, bandwidths, tiles, configurations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)

MOVING = ("delay", "offset")
"""Numbers that change from call to call (training draws a delay for each step). Left to itself Triton compiles a kernel
once for multiples of 16 and once for others: seconds in the middle of a run."""


@triton.jit
def interval(starts, rows, offset, queries, pairs, window, delay, STARTS: tl.constexpr, WINDOW: tl.constexpr):
    """First and last pair of the queries `rows`; first > last for one that reads nothing or does not exist."""
    position = offset + rows
    last = tl.where(rows < queries, tl.minimum(position - delay, pairs - 1), -1)
    first = tl.zeros_like(last)
    if WINDOW:
        first = tl.maximum(position - window + 1, 0)
    if STARTS:
        first = tl.maximum(first, tl.load(starts + rows, mask=rows < queries, other=0))
    return first, last


@triton.jit
def count_power(first, last, exponent):
    """n^alpha of queries with these intervals, and log2 n; 1 and 0 for a query that reads nothing."""
    log_count = tl.log2(tl.maximum(last - first + 1, 1).to(tl.float32))
    return tl.exp2(exponent * log_count), log_count


@triton.jit
def load_rows(base, rows, step, limit, size, D: tl.constexpr, EVEN: tl.constexpr):
    """Rows [., D] of a head at `base`; zero from `limit` on and beyond the head's size."""
    columns = tl.arange(0, D)
    at = base + rows.to(tl.int64)[:, None] * step + columns[None, :]
    if EVEN:
        return tl.load(at, mask=(rows < limit)[:, None], other=0.0)
    return tl.load(at, mask=(rows < limit)[:, None] & (columns < size)[None, :], other=0.0)


@triton.jit
def rows_at(base, step, N: tl.constexpr, D: tl.constexpr):
    """Where the first N rows [., D] of a head at `base` lie: a loop that adds to these spares itself the products."""
    return base + tl.arange(0, N).to(tl.int64)[:, None] * step + tl.arange(0, D)[None, :]


@triton.jit
def load_rows_at(at, n, step, limit, size, N: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr):
    """Rows n <= j < n + N of a head, as load_rows does; `at` points to the first N."""
    inside = (tl.arange(0, N) < limit - n)[:, None]
    if EVEN:
        return tl.load(at + tl.cast(n, tl.int64) * step, mask=inside, other=0.0)
    return tl.load(at + tl.cast(n, tl.int64) * step, mask=inside & (tl.arange(0, D) < size)[None, :], other=0.0)


@triton.jit
def store_rows(base, tile, rows, step, limit, size, D: tl.constexpr):
    columns = tl.arange(0, D)
    mask = (rows < limit)[:, None] & (columns < size)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * step + columns[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def spans(first, last, valid, N: tl.constexpr):
    """Where a block of queries reads: (begin, full, full_end, end). Pairs between full and full_end are open to every
    query; before and after a mask decides. From `begin` to `full` and to `full_end` it is a multiple of N."""
    some = first <= last
    end = tl.max(tl.where(some, last + 1, 0), 0)
    begin = tl.minimum(tl.min(tl.where(some, first, 2147483647), 0), end)
    full = begin + tl.cdiv(tl.max(tl.where(valid, tl.maximum(first - begin, 0), 0), 0), N) * N
    full_end = begin + tl.maximum(tl.min(tl.where(valid, last, 2147483646), 0) + 1 - begin, 0) // N * N
    most = begin + tl.cdiv(end - begin, N) * N
    full = tl.minimum(full, most)
    return begin, full, tl.maximum(full, tl.minimum(full_end, most)), end


def configs(fields: str, choices: str) -> list[triton.Config]:
    """Configurations from a table: each line the constants named in `fields`, then warps and stages."""
    names = fields.split()
    rows = ([int(word) for word in line.split()] for line in choices.strip().splitlines())
    return [triton.Config(dict(zip(names, row, strict=False)), num_warps=row[-2], num_stages=row[-1]) for row in rows]


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products of tiles in `dtype`."""
    if dtype is not torch.float32 or torch.backends.cuda.matmul.allow_tf32:
        return "tf32"  # 16-bit numbers know no other
    return "ieee" if torch.version.hip else "tf32x3"  # three products, as good as fp32


def constants(queries: Tensor, starts: Tensor | None, window: int | None) -> dict:
    size = queries.shape[3]
    width = max(16, triton.next_power_of_2(size))
    return {"STARTS": starts is not None, "WINDOW": window is not None, "PRECISION": dot_precision(queries.dtype),
            "D": width, "EVEN": width == size}  # fmt: skip


def plain(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()

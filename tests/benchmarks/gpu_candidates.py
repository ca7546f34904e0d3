"""A kernel that has not earned its place yet: memory_read's backward pass with five products for seven (part q of a visit).

Ours lets a program own rows that are keys and queries at once, so that scores and their gradients are made twice, and each
sum lies in one program. Here a program owns rows as keys alone, and what their queries receive is added to memory in fp32 by
whoever comes (as FlashAttention-2 and cuDNN do): two products and half of the exponentials less, and not the same bits
twice. For whole sequences, with a delay or a window, keys that are the queries, heads of a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.kernels import tuning
from mmcore.kernels.memory_read.triton_backward import _PREPARE, EXTENT
from mmcore.kernels.memory_read.triton_parts import LOG2E, constants, load_rows, load_rows_at, rows_at, store_rows


@triton.jit
def _add(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _span(
    grad_key, grad_value, k, v, rows, keys, grad, statistics, along, scales, means, sums, slips, step, grad_step,
    begin, end, count, apart, delay, window,
    MASKED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, QB: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """What the keys `rows` and their values receive from the queries begin <= i < end, keys log2(e) times too much; and,
    added to `sums` [count, D] and `slips`, what these queries receive. Scores are transposed: [keys, queries].

    Of each query `slips` has w_j q.k_j, ds_j and ds_j q.k_j added up over j (SUMS 3), ds_j (q.k_j - means) (1), or nothing.
    """
    queries_at, grad_at = rows_at(keys, step, QB, D), rows_at(grad, grad_step, QB, D)
    sums_at = sums + tl.arange(0, QB)[:, None] * D + tl.arange(0, D)[None, :]
    for i in range(begin, end, QB):
        numbers = i + tl.arange(0, QB)
        q = load_rows_at(queries_at, i, step, count, D, QB, D, True)
        upstream = load_rows_at(grad_at, i, grad_step, count, D, QB, D, True)
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        log_total = tl.load(statistics + numbers, mask=numbers < count, other=float("inf"))
        scale = tl.load(scales + numbers, mask=numbers < count, other=0.0)
        grad_weights = tl.dot(v, tl.trans(upstream), input_precision=PRECISION)
        weights = tl.exp2(products * scale[None, :] - log_total[None, :])
        if MASKED:
            open_ = (numbers[None, :] - delay >= rows[:, None]) & (numbers[None, :] - window < rows[:, None])
            weights = tl.where(open_, weights, 0.0)
        grad_value = tl.dot(weights.to(k.dtype), upstream, grad_value, input_precision=PRECISION)
        level = tl.load(along + numbers, mask=numbers < count, other=0.0)
        grad_scores = weights * (grad_weights - level[None, :])
        if SUMS == 1:
            mean = tl.load(means + numbers, mask=numbers < count, other=0.0)
            slip = tl.sum(grad_scores * (products - mean[None, :]), 0)
            tl.atomic_add(slips + numbers, slip, mask=numbers < count, sem="relaxed")
        if SUMS == 3:
            a, b, c = tl.reduce((weights * products, grad_scores, grad_scores * products), 0, _add)
            tl.atomic_add(slips + numbers, a, mask=numbers < count, sem="relaxed")
            tl.atomic_add(slips + apart + numbers, b, mask=numbers < count, sem="relaxed")
            tl.atomic_add(slips + 2 * apart + numbers, c, mask=numbers < count, sem="relaxed")
        received = (grad_scores * scale[None, :]).to(k.dtype)
        grad_key = tl.dot(received, q, grad_key, input_precision=PRECISION)
        grad_query = tl.dot(tl.trans(received), k, input_precision=PRECISION)
        inside = (tl.arange(0, QB) < count - i)[:, None]
        tl.atomic_add(sums_at + tl.cast(i, tl.int64) * D, grad_query, mask=inside, sem="relaxed")
    return grad_key, grad_value


@triton.jit
def _columns_kernel(
    keys, values, grad, statistics, along, scales, means, sums, slips, grad_values, count, heads,
    key_row, key_step, key_head, value_row, value_step, value_head, grad_row, grad_step, grad_head, delay, window,
    SUMS: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, R: tl.constexpr, QB: tl.constexpr,
):  # fmt: skip
    """All that R keys of a head give and receive."""
    lowest = tl.program_id(0) * R
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = lowest + tl.arange(0, R)
    keys += b * key_row + h * key_head
    values += b * value_row + h * value_head
    grad += b * grad_row + h * grad_head
    first = row.to(tl.int64) * count
    statistics += first
    along += first
    scales += first
    means += first
    slips += first
    sums += first * D
    k = load_rows(keys, rows, key_step, count, D, D, True)
    v = load_rows(values, rows, value_step, count, D, D, True)
    grad_key = tl.zeros([R, D], tl.float32)
    grad_value = tl.zeros([R, D], tl.float32)
    apart = count * tl.num_programs(1)
    begin = (lowest + delay) // QB * QB
    end = tl.minimum(count, lowest + R - 1 + window)
    full = end if WINDOW else tl.minimum(tl.cdiv(lowest + R - 1 + delay, QB) * QB, end)
    grad_key, grad_value = _span(
        grad_key, grad_value, k, v, rows, keys, grad, statistics, along, scales, means, sums, slips, key_step, grad_step,
        begin, full, count, apart, delay, window, True, SUMS, PRECISION, QB, D,
    )
    if not WINDOW:
        grad_key, grad_value = _span(
            grad_key, grad_value, k, v, rows, keys, grad, statistics, along, scales, means, sums, slips, key_step, grad_step,
            full, end, count, apart, delay, window, False, SUMS, PRECISION, QB, D,
        )
    store_rows(grad_values + (b * count * heads + h) * D, grad_value, rows, heads * D, count, D, D)
    at = sums + lowest.to(tl.int64) * D + tl.arange(0, R)[:, None] * D + tl.arange(0, D)[None, :]
    tl.atomic_add(at, grad_key, mask=(rows < count)[:, None], sem="relaxed")


@triton.jit
def _finish_kernel(sums, slips, grad_keys, grad_betas, count, heads, apart, SUMS: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    """Sums in fp32 as gradients of the keys, in their dtype; and those of each query's bandwidth."""
    row = tl.program_id(1)
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = tl.program_id(0) * E + tl.arange(0, E)
    tile = load_rows(sums + row.to(tl.int64) * count * D, rows, D, count, D, D, True) * (1 / LOG2E)
    store_rows(grad_keys + (b * count * heads + h) * D, tile, rows, heads * D, count, D, D)
    at = row.to(tl.int64) * count + rows
    grad_beta = tl.load(slips + at, mask=rows < count, other=0.0)
    if SUMS == 3:
        slip = tl.load(slips + apart + at, mask=rows < count, other=0.0)
        grad_beta = tl.load(slips + 2 * apart + at, mask=rows < count, other=0.0) - slip * grad_beta
    tl.store(grad_betas + at, grad_beta, mask=rows < count)


_FINISH = tuning.Tuned(_finish_kernel, [triton.Config({}, num_warps=4, num_stages=1)], ())


def columns(config: triton.Config) -> tuning.Tuned:
    """The kernel in one configuration of R, QB, warps and stages."""
    return tuning.Tuned(_columns_kernel, [config], ())


def run_backward(
    gather: tuning.Tuned, grad: Tensor, keys: Tensor, values: Tensor, scalars: list[Tensor], window: int | None, delay: int,
    out: Tensor, statistics: Tensor, sums: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of keys and values, and those of each query's bandwidth [B, H, T], which `sums` 3 alone has right:
    1 takes zeros for means that a forward pass would keep, and 0 leaves them out, both for their time."""
    batch, count, heads, width = keys.shape
    settings = constants(keys, None, window)
    blocks = triton.cdiv(count, EXTENT)
    numbers = torch.empty(4, batch, heads, count, dtype=torch.float32, device=keys.device)
    along, scales, means, grad_betas = numbers.unbind()
    means.zero_()
    marks = torch.empty(0, dtype=torch.int32, device=keys.device)
    _PREPARE(
        (blocks, batch * heads), grad, out, marks, *scalars, along, scales, marks, count, count, heads, width,
        *grad.stride()[:3], window or 0, delay, 0, on=grad,
        STARTS=False, WINDOW=window is not None, D=width, EVEN=True, E=EXTENT,
    )  # fmt: skip
    received = torch.zeros(batch, heads, count, width, dtype=torch.float32, device=keys.device)
    slips = torch.zeros(3, batch, heads, count, dtype=torch.float32, device=keys.device)
    grad_keys, grad_values = torch.empty_like(keys), torch.empty_like(values)
    gather(
        lambda meta: (triton.cdiv(count, meta["R"]), batch * heads),
        keys, values, grad, statistics, along, scales, means, received, slips, grad_values, count, heads,
        *keys.stride()[:3], *values.stride()[:3], *grad.stride()[:3], delay, window or 1 << 30, on=keys,
        SUMS=sums, WINDOW=window is not None, PRECISION=settings["PRECISION"], D=width,
    )  # fmt: skip
    _FINISH(
        (blocks, batch * heads), received, slips, grad_keys, grad_betas, count, heads, slips.stride(0), on=keys,
        SUMS=sums, D=width, E=EXTENT,
    )  # fmt: skip
    return grad_keys, grad_values, grad_betas

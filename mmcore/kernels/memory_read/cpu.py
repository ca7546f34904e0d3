"""memory_read in C: cpu.c and cpu_backward.c for many queries, cpu_few.c for a few (decoding). fp32; under autocast in bf16,
and of pairs in fp16, all operands of many queries are rounded to bf16 but the scores', where the processor multiplies it."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import native, registry
from mmcore.kernels.layout import FLOATS
from mmcore.kernels.linear.cpu import rounding

FEW = 8  # up to so many queries, without gradients, cpu_few.c reads the pairs in place

# Floats of keys below which a second thread costs more than it brings: waking one takes 2-5 us.
_WORTH_A_THREAD = 65_536

# struct call of memory_read_call.h, and struct backward of cpu_backward.c, as bytes: a decoder calls this twice a layer for
# each token, and a ctypes.Structure of so many fields took 4 us to fill where this takes 2.
_CALL = struct.Struct("32q").pack
_BACKWARD = struct.Struct("6q").pack


_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    memory_read_forward_scratch=(ctypes.c_long, [ctypes.c_char_p]),
    memory_read_forward=[ctypes.c_char_p, ctypes.c_void_p],
)
_C_BACKWARD = native.functions(
    Path(__file__).with_name("cpu_backward.c"),
    memory_read_backward_scratch=(ctypes.c_long, [ctypes.c_char_p]),
    memory_read_backward=[ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p],
)
_C_FEW = native.functions(
    Path(__file__).with_name("cpu_few.c"),
    memory_read_few_scratch=(ctypes.c_long, [ctypes.c_char_p]),
    memory_read_few=[ctypes.c_char_p, ctypes.c_void_p],
)


def _call(queries, keys, values, bandwidths, place, out, statistics, threads: int, shares: int, rounded=False) -> bytes:
    """struct call. Holds addresses only: the tensors must outlive it."""
    starts, window, delay, offset = place
    batch, length, heads, size = queries.shape
    q_b, q_t, q_h, _ = queries.stride()
    k_b, k_t, k_h, _ = keys.stride()
    v_b, v_t, v_h, _ = values.stride()
    base, slope, exponent = bandwidths
    largest = statistics.data_ptr() if statistics is not None else 0
    total = largest + 4 * batch * heads * length if largest else 0
    return _CALL(
        batch, length, keys.shape[1], heads, size, window or 0, delay, offset,
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(), q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
        base.data_ptr(), slope.data_ptr(), exponent.data_ptr(), starts.data_ptr() if starts is not None else 0,
        out.data_ptr(), largest, total, threads, shares, keys.dtype is torch.float16, rounded, heads * size,
    )  # fmt: skip


def _shares(heads: int, queries: int, threads: int) -> int:
    """Into how many shares the queries of each head are cut, so that no thread is left without work.

    One where the heads alone fill the threads: each share copies the pairs that it reads, and in the backward
    pass has its own dK and dV.
    """
    if heads % threads == 0 or heads >= 4 * threads:
        return 1
    return max(1, min(-(-4 * threads // heads), queries // 64))


def _few(queries, keys, values, bandwidths, place) -> Tensor:
    """A few queries, no gradients."""
    batch, length, heads, size = queries.shape
    window, pairs = place[1], keys.shape[1]
    reach = min(pairs, window + length) if window else pairs
    threads = torch.get_num_threads() if batch * heads * reach * size >= _WORTH_A_THREAD else 1
    # units of equal work: heads where a head's pairs lie together, else whole rows of the batch
    units = batch * heads if keys.stride(2) > keys.stride(1) else batch
    shares = 1 if units % threads == 0 else threads
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)  # 1 us; torch.empty(shape) takes 3
    call = _call(queries, keys, values, bandwidths, place, out, None, threads, shares)
    states = torch.empty(_C_FEW.memory_read_few_scratch(call), **FLOATS)
    _C_FEW.memory_read_few(call, states.data_ptr())
    return out


def _forward(queries, keys, values, bandwidths, place, keep: bool, rounded: bool) -> tuple[Tensor, Tensor | None]:
    """(out, statistics [2, B, H, Tq] or None)."""
    batch, length, heads, _ = queries.shape
    threads = torch.get_num_threads()
    out = torch.empty(queries.shape, **FLOATS)
    statistics = torch.empty(2, batch, heads, length, **FLOATS) if keep else None
    shares = _shares(batch * heads, length, threads)
    call = _call(queries, keys, values, bandwidths, place, out, statistics, threads, shares, rounded)
    scratch = torch.empty(threads * _C.memory_read_forward_scratch(call), **FLOATS)
    _C.memory_read_forward(call, scratch.data_ptr())
    return out, statistics


def _run(keys, values, base, slope, exponent, queries, starts, window, delay, offset, rounded):
    queries = keys if queries is None else queries
    place = (starts, window, delay, offset)
    return _forward(queries, keys, values, (base, slope, exponent), place, keep=True, rounded=rounded)


def _fake(keys, values, base, slope, exponent, queries, starts, window, delay, offset, rounded):
    queries = keys if queries is None else queries
    batch, length, heads, _ = queries.shape
    return queries.new_empty(queries.shape), queries.new_empty(2, batch, heads, length)


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.place = inputs[7:]


def _gradients(ctx, grad, _):
    *inputs, out, statistics = ctx.saved_tensors
    grad_keys, grad_values, grad_base, grad_slope, grad_exponent, grad_queries = _read_backward(
        grad, *inputs, *ctx.place, out, statistics
    )
    if inputs[5] is None:
        grad_queries = None
    return grad_keys, grad_values, grad_base, grad_slope, grad_exponent, grad_queries, None, None, None, None, None


def _run_backward(
    grad, keys, values, base, slope, exponent, queries, starts, window, delay, offset, rounded, out, statistics
):
    same = queries is None
    queries = keys if same else queries
    batch, length, heads, _ = queries.shape
    grad = grad.contiguous()
    threads = torch.get_num_threads()
    shares = _shares(batch * heads, length, threads)
    place = (starts, window, delay, offset)
    call = _call(queries, keys, values, (base, slope, exponent), place, out, statistics, threads, shares, rounded)
    # where the queries are the keys, one tensor holds both gradients, unless each share has its own
    in_place = same and shares == 1
    grad_queries = None if in_place else torch.empty(queries.shape, **FLOATS)
    grad_keys, grad_values = (torch.empty(shares, *keys.shape, **FLOATS) for _ in range(2))
    grad_bandwidth = torch.empty(shares, batch, heads, 3, dtype=torch.float64, device="cpu")
    tensors = (grad, out, grad_queries, grad_keys, grad_values, grad_bandwidth)
    sides = _BACKWARD(*(0 if t is None else t.data_ptr() for t in tensors))
    scratch = torch.empty(threads * _C_BACKWARD.memory_read_backward_scratch(call), **FLOATS)
    _C_BACKWARD.memory_read_backward(call, sides, scratch.data_ptr())
    grad_keys, grad_values = (t[0] if shares == 1 else t.sum(0) for t in (grad_keys, grad_values))
    if same:
        grad_keys = grad_keys if in_place else grad_keys.add_(grad_queries)
        grad_queries = grad_keys.new_empty(0)
    bandwidths = (part.clone() for part in grad_bandwidth.sum((0, 1)).to(torch.float32).unbind(-1))
    return grad_keys, grad_values, *bandwidths, grad_queries


def _fake_backward(
    grad, keys, values, base, slope, exponent, queries, starts, window, delay, offset, rounded, out, statistics
):
    shapes = (keys.shape, values.shape, base.shape, base.shape, base.shape, (0,) if queries is None else queries.shape)
    return tuple(keys.new_empty(shape) for shape in shapes)


_read = registry.operator(
    "memory_read_cpu(Tensor keys, Tensor values, Tensor base, Tensor slope, Tensor exponent, Tensor? queries, "
    "Tensor? starts, int? window, SymInt delay, SymInt offset, bool rounded) -> (Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_read_backward = registry.operator(
    "memory_read_cpu_backward(Tensor grad, Tensor keys, Tensor values, Tensor base, Tensor slope, Tensor exponent, "
    "Tensor? queries, Tensor? starts, int? window, SymInt delay, SymInt offset, bool rounded, Tensor out, "
    "Tensor statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def memory_read(queries, keys, values, base, slope, exponent, starts, window, delay, offset) -> Tensor:
    """See mmcore.kernels.memory_read.memory_read."""
    inputs = (queries, keys, values, base, slope, exponent)
    # the caller has seen to it that queries, keys and values agree
    if not queries.dtype is base.dtype is slope.dtype is exponent.dtype is torch.float32:
        names = ", ".join(sorted({str(t.dtype) for t in inputs}))
        raise ConfigError(
            f"memory_read in C takes float32 tensors, and these are {names}: convert them, or use "
            f"implementation='blocked'"
        )
    same = queries is keys
    queries, values = _plain(queries), _plain(values)
    keys = queries if same else _plain(keys)
    bandwidths = [base.contiguous(), slope.contiguous(), exponent.contiguous()]
    if starts is not None:
        starts = starts.to(torch.int32).contiguous()
    if registry.direct(queries):
        if offset + queries.shape[1] <= delay:  # no pair is old enough: a long-term memory's first tokens
            return torch.zeros(queries.shape, **FLOATS)
        place = (starts, window, delay, offset)
        if 0 < queries.shape[1] <= FEW:
            return _few(queries, keys, values, bandwidths, place)
        return _forward(queries, keys, values, bandwidths, place, keep=False, rounded=rounding())[0]
    return _read(keys, values, *bandwidths, None if same else queries, starts, window, delay, offset, rounding())[0]

"""memory_read in C: cpu.c for many queries, cpu_few.c for a few (decoding). fp32 only."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.errors import ConfigError
from mmcore.kernels import native

_LONGS = ("batch", "queries", "pairs", "heads", "size", "window", "delay", "offset")
_POINTERS_1 = ("q", "k", "v")
_POINTERS_2 = ("base", "slope", "exponent", "starts", "out", "largest", "total", "scratch")


class _Call(ctypes.Structure):
    """struct call in memory_read_call.h."""

    _fields_ = [
        *((name, ctypes.c_long) for name in _LONGS),
        *((name, ctypes.c_void_p) for name in _POINTERS_1),
        *((f"{name}_{axis}", ctypes.c_long) for name in _POINTERS_1 for axis in "bth"),
        *((name, ctypes.c_void_p) for name in _POINTERS_2),
        ("threads", ctypes.c_long),
        ("shares", ctypes.c_long),
    ]


class _Backward(ctypes.Structure):
    """struct backward in cpu.c."""

    _fields_ = [
        (name, ctypes.c_void_p) for name in ("grad", "out", "grad_q", "grad_k", "grad_v", "grad_bandwidth")
    ]


FEW = 8  # up to so many queries, without gradients, cpu_few.c reads the pairs in place

# Floats of keys below which a second thread costs more than it brings: waking one takes 2-5 us.
_WORTH_A_THREAD = 32_768


@functools.cache
def _few_library() -> ctypes.CDLL:
    library = native.load(Path(__file__).with_name("cpu_few.c"))
    library.memory_read_few_scratch.restype = ctypes.c_long
    library.memory_read_few.restype = None
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(Path(__file__).with_name("cpu.c"))
    library.memory_read_scratch.argtypes = [ctypes.c_void_p, ctypes.c_long]
    library.memory_read_scratch.restype = ctypes.c_long
    library.memory_read_forward.restype = library.memory_read_backward.restype = None
    return library


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _call(queries, keys, values, bandwidths, starts, window, delay, offset, out, statistics) -> _Call:
    batch, length, heads, size = queries.shape
    stats = statistics.data_ptr() if statistics is not None else 0
    threads = torch.get_num_threads()
    return _Call(
        batch, length, keys.shape[1], heads, size, window or 0, delay, offset,
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(),
        *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        *(t.data_ptr() for t in bandwidths), starts.data_ptr() if starts is not None else 0, out.data_ptr(),
        stats, stats + 4 * batch * heads * length if stats else 0, 0, threads, _shares(batch * heads, length, threads),
    )  # fmt: skip


def _shares(heads: int, queries: int, threads: int) -> int:
    """Into how many shares the queries of each head are cut, so that no thread is left without work.

    One where the heads alone fill the threads: each share copies the pairs that it reads, and in the backward
    pass has its own dK and dV.
    """
    if heads % threads == 0 or heads >= 4 * threads:
        return 1
    return max(1, min(-(-4 * threads // heads), queries // 64))


def _scratch(call: _Call, copies: int) -> Tensor:
    """Buffers of all threads, entered into the call; keep the tensor until the call is over."""
    scratch = torch.empty(call.threads * _library().memory_read_scratch(ctypes.byref(call), copies))
    call.scratch = scratch.data_ptr()
    return scratch


def _few(queries, keys, values, bandwidths, place) -> Tensor:
    """A few queries, no gradients. A decoder calls this twice a layer for each token: no tensor operation too many."""
    batch, length, heads, size = queries.shape
    out = torch.empty_like(queries, memory_format=torch.contiguous_format)
    call = _call(queries, keys, values, bandwidths, *place, out, None)
    reach = min(call.pairs, call.window + length) if call.window else call.pairs
    if batch * heads * reach * size < 2 * _WORTH_A_THREAD:
        call.threads = 1
    # units of equal work: heads where a head's pairs lie together, else whole rows of the batch
    units = batch * heads if call.k_h > call.k_t else batch
    call.shares = 1 if units % call.threads == 0 else call.threads
    library = _few_library()
    scratch = torch.empty(library.memory_read_few_scratch(ctypes.byref(call)))
    call.scratch = scratch.data_ptr()
    library.memory_read_few(ctypes.byref(call))
    return out


def _forward(queries, keys, values, bandwidths, place, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(out, statistics [2, B, H, Tq] or None)."""
    batch, length, heads, _ = queries.shape
    out = torch.empty(queries.shape)
    statistics = torch.empty(2, batch, heads, length) if keep else None
    call = _call(queries, keys, values, bandwidths, *place, out, statistics)
    scratch = _scratch(call, 2)
    _library().memory_read_forward(ctypes.byref(call))
    del scratch
    return out, statistics


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, values, base, slope, exponent, starts, window, delay, offset):
        ctx.place = (starts, window, delay, offset)
        ctx.same = queries is keys
        out, statistics = _forward(queries, keys, values, (base, slope, exponent), ctx.place, keep=True)
        ctx.save_for_backward(queries, keys, values, base, slope, exponent, out, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        queries, keys, values, *bandwidths, out, statistics = ctx.saved_tensors
        grad = grad.contiguous()
        call = _call(queries, keys, values, bandwidths, *ctx.place, out, statistics)
        # where the queries are the keys, one tensor holds both gradients
        in_place = ctx.same and call.shares == 1
        grad_queries = None if in_place else torch.empty(queries.shape)
        grad_keys, grad_values = torch.empty(2, call.shares, *keys.shape)
        grad_bandwidth = torch.zeros(call.shares, call.batch, call.heads, 3, dtype=torch.float64)
        tensors = (grad, out, grad_queries, grad_keys, grad_values, grad_bandwidth)
        sides = _Backward(*(0 if t is None else t.data_ptr() for t in tensors))
        scratch = _scratch(call, 4)
        _library().memory_read_backward(ctypes.byref(call), ctypes.byref(sides))
        del scratch
        grad_keys, grad_values = (t[0] if call.shares == 1 else t.sum(0) for t in (grad_keys, grad_values))
        grad_bandwidths = grad_bandwidth.sum((0, 1)).to(torch.float32).unbind(-1)
        return grad_queries, grad_keys, grad_values, *grad_bandwidths, None, None, None, None


def memory_read(queries, keys, values, base, slope, exponent, starts, window, delay, offset) -> Tensor:
    """See mmcore.kernels.memory_read.memory_read."""
    inputs = (queries, keys, values, base, slope, exponent)
    if any(t.dtype is not torch.float32 for t in inputs):
        raise ConfigError(
            f"memory_read in C takes float32 tensors, and these are {', '.join(sorted({str(t.dtype) for t in inputs}))}: "
            f"convert them, or use implementation='blocked'"
        )
    same = queries is keys
    queries, values = _plain(queries), _plain(values)
    keys = queries if same else _plain(keys)
    bandwidths = [t.contiguous() for t in inputs[3:]]
    if starts is not None:
        starts = starts.to(torch.int32).contiguous()
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _Read.apply(queries, keys, values, *bandwidths, starts, window, delay, offset)
    if 0 < queries.shape[1] <= FEW:
        return _few(queries, keys, values, bandwidths, (starts, window, delay, offset))
    return _forward(queries, keys, values, bandwidths, (starts, window, delay, offset), keep=False)[0]

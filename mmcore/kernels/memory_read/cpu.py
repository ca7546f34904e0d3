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
    ]


class _Backward(ctypes.Structure):
    """struct backward in cpu.c."""

    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("grad", "out", "grad_q", "grad_k", "grad_v", "grad_bandwidth")),
        ("copies", ctypes.c_long),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(Path(__file__).with_name("cpu.c"))
    library.memory_read_scratch.argtypes = [ctypes.c_long]
    library.memory_read_scratch.restype = ctypes.c_long
    library.memory_read_forward.restype = library.memory_read_backward.restype = None
    return library


def _plain(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last axis is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _call(queries, keys, values, bandwidths, starts, window, delay, offset, out, statistics, scratch, threads) -> _Call:
    batch, length, heads, size = queries.shape
    stats = statistics.data_ptr() if statistics is not None else 0
    return _Call(
        batch, length, keys.shape[1], heads, size, window or 0, delay, offset,
        queries.data_ptr(), keys.data_ptr(), values.data_ptr(),
        *queries.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        *(t.data_ptr() for t in bandwidths), starts.data_ptr() if starts is not None else 0, out.data_ptr(),
        stats, stats + 4 * batch * heads * length if stats else 0, scratch.data_ptr(), threads,
    )  # fmt: skip


def _scratch(size: int, threads: int) -> Tensor:
    return torch.empty(threads * _library().memory_read_scratch(size))


def _forward(queries, keys, values, bandwidths, starts, window, delay, offset, keep: bool) -> tuple[Tensor, Tensor | None]:
    """(out, statistics [2, B, H, Tq] or None)."""
    batch, length, heads, size = queries.shape
    threads = torch.get_num_threads()
    out = torch.empty(queries.shape)
    statistics = torch.empty(2, batch, heads, length) if keep else None
    scratch = _scratch(size, threads)
    place = (starts, window, delay, offset)
    call = _call(queries, keys, values, bandwidths, *place, out, statistics, scratch, threads)
    _library().memory_read_forward(ctypes.byref(call))
    return out, statistics


def _copies(heads: int, threads: int) -> int:
    """Into how many shares the queries of each head are cut, so that no thread is left without work.

    Each share needs its own sums of dK and dV: one share where the heads alone fill the threads.
    """
    return 1 if heads % threads == 0 or heads >= 4 * threads else -(-4 * threads // heads)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, keys, values, base, slope, exponent, starts, window, delay, offset):
        ctx.place = (starts, window, delay, offset)
        ctx.same = queries is keys
        out, statistics = _forward(queries, keys, values, (base, slope, exponent), *ctx.place, keep=True)
        ctx.save_for_backward(queries, keys, values, base, slope, exponent, out, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        queries, keys, values, base, slope, exponent, out, statistics = ctx.saved_tensors
        batch, _, heads, size = queries.shape
        threads = torch.get_num_threads()
        copies = _copies(batch * heads, threads)
        grad = grad.contiguous()
        grad_keys = torch.zeros(copies, *keys.shape)
        grad_values = torch.zeros(copies, *keys.shape)
        in_place = ctx.same and copies == 1
        grad_queries = grad_keys if in_place else torch.empty(queries.shape)
        grad_bandwidth = torch.zeros(copies, batch, heads, 3, dtype=torch.float64)
        scratch = _scratch(size, threads)
        call = _call(
            queries, keys, values, (base, slope, exponent), *ctx.place, out, statistics, scratch, threads
        )
        tensors = (grad, out, grad_queries, grad_keys, grad_values, grad_bandwidth)
        sides = _Backward(*(t.data_ptr() for t in tensors), copies)
        _library().memory_read_backward(ctypes.byref(call), ctypes.byref(sides))
        grad_keys, grad_values = (t[0] if copies == 1 else t.sum(0) for t in (grad_keys, grad_values))
        bandwidths = grad_bandwidth.sum((0, 1)).to(torch.float32).unbind(-1)
        # where the queries are the keys, one tensor holds both gradients
        return None if in_place else grad_queries, grad_keys, grad_values, *bandwidths, None, None, None, None


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
    return _forward(queries, keys, values, bandwidths, starts, window, delay, offset, keep=False)[0]

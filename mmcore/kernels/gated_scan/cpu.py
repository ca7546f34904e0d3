"""The gated scan in C: one pass over memory each way, in fp32."""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.errors import ConfigError
from mmcore.kernels import native
from mmcore.kernels.layout import threads_for, with_heads_together

_FORWARD = struct.Struct("10P11n")  # `Forward` in cpu.c


def gated_scan(
    raw_keys: Tensor,
    log_gates: Tensor,
    log_decays: Tensor,
    resets: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See `mmcore.kernels.gated_scan.gated_scan`. fp16 and bf16 are converted on the way in and out.

    Raises ConfigError for fp64, which this form would round.
    """
    dtype = raw_keys.dtype
    if dtype is not torch.float32 or log_gates.dtype is not torch.float32 or log_decays.dtype is not torch.float32:
        if torch.float64 in (dtype, log_gates.dtype, log_decays.dtype):
            raise ConfigError("gated_scan computes in fp32 as 'cpu': use implementation='blocked' for fp64")
        raw_keys, log_gates, log_decays = raw_keys.float(), log_gates.float(), log_decays.float()
    vector, log_scale = (None, None) if state is None else (_plain(state[0]), _plain(state[1]))
    if resets is not None and not resets.is_contiguous():
        resets = resets.contiguous()
    if torch.is_grad_enabled() and (raw_keys.requires_grad or log_gates.requires_grad or log_decays.requires_grad):
        keys, *state = _Scan.apply(raw_keys, log_gates, log_decays, resets, vector, log_scale)
        state = tuple(state)
    else:
        keys, state = _forward(raw_keys, log_gates, log_decays, resets, vector, log_scale, None)
    return keys if dtype is torch.float32 else keys.to(dtype), state


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, raw, gates, decays, resets, vector, log_scale):
        batch, time, heads, _ = raw.shape
        kept = torch.empty(batch, time, 3, heads)
        keys, state = _forward(raw, gates, decays, resets, vector, log_scale, kept)
        ctx.save_for_backward(keys, kept, vector)
        ctx.mark_non_differentiable(*state)
        return keys, *state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_keys, _grad_vector, _grad_log_scale):
        keys, kept, vector = ctx.saved_tensors
        batch, time, heads, size = keys.shape
        grad_keys = with_heads_together(grad_keys)
        grad_raw, scratch = torch.empty(keys.shape), torch.empty(batch, heads, size)
        grad_gates, grad_decays = torch.empty(batch, time, heads), torch.empty(batch, time, heads)
        _library().gated_scan_backward(
            grad_keys.data_ptr(), keys.data_ptr(), kept.data_ptr(), _or_null(vector), grad_raw.data_ptr(),
            grad_gates.data_ptr(), grad_decays.data_ptr(), scratch.data_ptr(),
            batch, time, heads, size, *grad_keys.stride()[:2], threads_for(keys.numel()),
        )  # fmt: skip
        return grad_raw, grad_gates, grad_decays, None, None, None


def _forward(raw, gates, decays, resets, vector, log_scale, kept) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Keys and the last state; fills `kept` if there is one."""
    raw = with_heads_together(raw)
    if gates.stride(2) != 1:
        gates = gates.contiguous()
    if decays.stride(2) != 1:
        decays = decays.contiguous()
    batch, time, heads, size = raw.shape
    # empty_like, where there is something alike, and bare numbers: torch.empty(shape) takes 3 us, these 1.3.
    keys = torch.empty_like(raw, memory_format=torch.contiguous_format)
    new_vector, new_log_scale = torch.empty(batch, heads, size), torch.empty(batch, heads)
    raw_row, raw_step, _, _ = raw.stride()
    gate_row, gate_step, _ = gates.stride()
    decay_row, decay_step, _ = decays.stride()
    arguments = _FORWARD.pack(
        raw.data_ptr(), gates.data_ptr(), decays.data_ptr(), _or_null(resets), _or_null(vector), _or_null(log_scale),
        keys.data_ptr(), _or_null(kept), new_vector.data_ptr(), new_log_scale.data_ptr(), batch, time, heads, size,
        raw_row, raw_step, gate_row, gate_step, decay_row, decay_step, threads_for(batch * time * heads * size),
    )  # fmt: skip
    _library().gated_scan_forward(arguments)
    return keys, (new_vector, new_log_scale)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(Path(__file__).with_name("cpu.c"))
    address, count = ctypes.c_void_p, ctypes.c_ssize_t
    library.gated_scan_forward.argtypes = [ctypes.c_char_p]
    library.gated_scan_backward.argtypes = [address] * 8 + [count] * 6 + [ctypes.c_int]
    library.gated_scan_forward.restype = library.gated_scan_backward.restype = None
    return library


def _plain(part: Tensor) -> Tensor:
    """A part of the state as contiguous fp32 without gradient."""
    if part.dtype is torch.float32 and not part.requires_grad and part.is_contiguous():
        return part
    return part.detach().to(torch.float32).contiguous()


def _or_null(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

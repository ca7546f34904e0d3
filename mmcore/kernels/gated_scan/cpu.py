"""The gated scan in C: one pass over memory each way, in fp32."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmcore.errors import ConfigError
from mmcore.kernels import native
from mmcore.kernels.layout import threads_for, with_heads_together


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
    if state is None:
        batch, _, heads, size = raw_keys.shape
        vector, log_scale = raw_keys.new_zeros(batch, heads, size), raw_keys.new_full((batch, heads), -torch.inf)
    else:
        vector, log_scale = _copy(state[0]), _copy(state[1])
    if resets is not None and not resets.is_contiguous():
        resets = resets.contiguous()
    if torch.is_grad_enabled() and (raw_keys.requires_grad or log_gates.requires_grad or log_decays.requires_grad):
        keys = _Scan.apply(raw_keys, log_gates, log_decays, resets, vector, log_scale)
    else:
        keys = torch.empty(raw_keys.shape)
        _forward(raw_keys, log_gates, log_decays, resets, keys, None, vector, log_scale)
    return keys if dtype is torch.float32 else keys.to(dtype), (vector, log_scale)


class _Scan(torch.autograd.Function):
    """vector and log_scale are overwritten with the last state: they belong to the caller above, to nobody else."""

    @staticmethod
    def forward(ctx, raw, gates, decays, resets, vector, log_scale):
        batch, time, heads, _ = raw.shape
        keys = torch.empty(raw.shape)
        kept = torch.empty(batch, time, 3, heads)
        first_vector = vector.clone()
        _forward(raw, gates, decays, resets, keys, kept, vector, log_scale)
        ctx.save_for_backward(keys, kept, first_vector)
        return keys

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_keys):
        keys, kept, first_vector = ctx.saved_tensors
        batch, time, heads, size = keys.shape
        grad_keys = with_heads_together(grad_keys)
        grad_raw, scratch = torch.empty(keys.shape), torch.empty(first_vector.shape)
        grad_gates, grad_decays = torch.empty(batch, time, heads), torch.empty(batch, time, heads)
        _library().gated_scan_backward(
            grad_keys.data_ptr(), keys.data_ptr(), kept.data_ptr(), first_vector.data_ptr(), grad_raw.data_ptr(),
            grad_gates.data_ptr(), grad_decays.data_ptr(), scratch.data_ptr(),
            batch, time, heads, size, *grad_keys.stride()[:2], threads_for(keys.numel()),
        )  # fmt: skip
        return grad_raw, grad_gates, grad_decays, None, None, None


def _forward(raw, gates, decays, resets, keys, kept, vector, log_scale) -> None:
    """Fill keys and kept (or None); carry vector and log_scale to the last step."""
    raw = with_heads_together(raw)
    if gates.stride(2) != 1:
        gates = gates.contiguous()
    if decays.stride(2) != 1:
        decays = decays.contiguous()
    _library().gated_scan_forward(
        raw.data_ptr(), gates.data_ptr(), decays.data_ptr(), None if resets is None else resets.data_ptr(),
        keys.data_ptr(), None if kept is None else kept.data_ptr(), vector.data_ptr(), log_scale.data_ptr(),
        *raw.shape, *raw.stride()[:2], *gates.stride()[:2], *decays.stride()[:2], threads_for(raw.numel()),
    )  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(Path(__file__).with_name("cpu.c"))
    address, count = ctypes.c_void_p, ctypes.c_ssize_t
    library.gated_scan_forward.argtypes = [address] * 8 + [count] * 10 + [ctypes.c_int]
    library.gated_scan_backward.argtypes = [address] * 8 + [count] * 6 + [ctypes.c_int]
    library.gated_scan_forward.restype = library.gated_scan_backward.restype = None
    return library


def _copy(part: Tensor) -> Tensor:
    """A contiguous fp32 copy, without gradient."""
    return part.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)

"""The gated scan in C: one pass over memory each way, in fp32."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import native, registry
from mmcore.kernels.layout import FLOATS, threads_for, with_heads_together

_FORWARD = struct.Struct("10P11n")  # `Forward` in cpu.c
_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    gated_scan_forward=[ctypes.c_char_p],
    gated_scan_backward=[ctypes.c_void_p] * 8 + [ctypes.c_ssize_t] * 6 + [ctypes.c_int],
)


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
    if registry.direct(raw_keys):
        keys, *state = _forward(raw_keys, log_gates, log_decays, resets, vector, log_scale, None)
    else:
        keys, *state, _ = _scan(raw_keys, log_gates, log_decays, resets, vector, log_scale)
    return keys if dtype is torch.float32 else keys.to(dtype), tuple(state)


def _run(raw, gates, decays, resets, vector, log_scale):
    batch, time, heads, _ = raw.shape
    kept = torch.empty(batch, time, 2, heads, **FLOATS)
    return *_forward(raw, gates, decays, resets, vector, log_scale, kept), kept


def _fake(raw, gates, decays, resets, vector, log_scale):
    batch, time, heads, size = raw.shape
    return (
        raw.new_empty(raw.shape), raw.new_empty(batch, heads, size), raw.new_empty(batch, heads),
        raw.new_empty(batch, time, 2, heads),
    )  # fmt: skip


def _keep(ctx, inputs, output):
    keys, vector, log_scale, kept = output
    ctx.mark_non_differentiable(vector, log_scale, kept)
    ctx.save_for_backward(keys, kept, inputs[4])


def _gradients(ctx, grad_keys, *_):
    return *_scan_backward(grad_keys, *ctx.saved_tensors), None, None, None


def _run_backward(grad_keys, keys, kept, vector):
    batch, time, heads, size = keys.shape
    grad_keys = with_heads_together(grad_keys)
    grad_raw, scratch = torch.empty(keys.shape, **FLOATS), torch.empty(batch, heads, size, **FLOATS)
    grad_gates, grad_decays = (torch.empty(batch, time, heads, **FLOATS) for _ in range(2))
    _C.gated_scan_backward(
        grad_keys.data_ptr(), keys.data_ptr(), kept.data_ptr(), _or_null(vector), grad_raw.data_ptr(),
        grad_gates.data_ptr(), grad_decays.data_ptr(), scratch.data_ptr(),
        batch, time, heads, size, *grad_keys.stride()[:2], threads_for(keys.numel()),
    )  # fmt: skip
    return grad_raw, grad_gates, grad_decays


def _fake_backward(grad_keys, keys, kept, vector):
    return keys.new_empty(keys.shape), keys.new_empty(keys.shape[:3]), keys.new_empty(keys.shape[:3])


_scan = registry.operator(
    "gated_scan_cpu(Tensor raw_keys, Tensor log_gates, Tensor log_decays, Tensor? resets, Tensor? vector, "
    "Tensor? log_scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_scan_backward = registry.operator(
    "gated_scan_cpu_backward(Tensor grad_keys, Tensor keys, Tensor kept, Tensor? vector) -> (Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


def _forward(raw, gates, decays, resets, vector, log_scale, kept) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and the last state; fills `kept` if there is one."""
    raw = with_heads_together(raw)
    if gates.stride(2) != 1:
        gates = gates.contiguous()
    if decays.stride(2) != 1:
        decays = decays.contiguous()
    batch, time, heads, size = raw.shape
    # empty_like, where there is something alike, and bare numbers: torch.empty(shape) takes 3 us, these 1.3.
    keys = torch.empty_like(raw, memory_format=torch.contiguous_format)
    new_vector, new_log_scale = torch.empty(batch, heads, size, **FLOATS), torch.empty(batch, heads, **FLOATS)
    raw_row, raw_step, _, _ = raw.stride()
    gate_row, gate_step, _ = gates.stride()
    decay_row, decay_step, _ = decays.stride()
    arguments = _FORWARD.pack(
        raw.data_ptr(), gates.data_ptr(), decays.data_ptr(), _or_null(resets), _or_null(vector), _or_null(log_scale),
        keys.data_ptr(), _or_null(kept), new_vector.data_ptr(), new_log_scale.data_ptr(), batch, time, heads, size,
        raw_row, raw_step, gate_row, gate_step, decay_row, decay_step, threads_for(batch * time * heads * size),
    )  # fmt: skip
    _C.gated_scan_forward(arguments)
    return keys, new_vector, new_log_scale


def _plain(part: Tensor) -> Tensor:
    """A part of the state as contiguous fp32 without gradient."""
    if part.dtype is torch.float32 and not part.requires_grad and part.is_contiguous():
        return part
    return part.detach().to(torch.float32).contiguous()


def _or_null(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

"""The gated scan as matrix products over chunks of time, on any device.

Within a chunk of C steps the vector u_i = kbar_i / exp(M_i) is a triangular product:

    u_i = sum_{j <= i} exp(log_gate_j + S_ji - M_i) k~_j + exp(S_i + M_in - M_i) u_in
    S_ji = sum_{j < l <= i} log_decay_l,   S_i the same from the chunk's first step

so that only the chunks, T / C of them, follow one another in Python. C = 32 balances the triangles (B T H C numbers,
half as many as the keys at D = 64) against the number of chunks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels import registry

CHUNK = 32


def gated_scan(
    raw_keys: Tensor,
    log_gates: Tensor,
    log_decays: Tensor,
    resets: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See `mmcore.kernels.gated_scan.gated_scan`. Kept for the backward pass: keys, norms and M; triangles are not."""
    precision = torch.float64 if raw_keys.dtype == torch.float64 else torch.float32
    batch, _, heads, size = raw_keys.shape
    if state is None:
        vector = raw_keys.new_zeros(batch, heads, size, dtype=precision)
        log_scale = raw_keys.new_full((batch, heads), -torch.inf, dtype=precision)
    else:
        vector, log_scale = (part.detach().to(precision) for part in state)
    if raw_keys.shape[1] == 0:
        return torch.zeros_like(raw_keys), (vector.clone(), log_scale.clone())
    raw, gates, decays = (part.to(precision) for part in (raw_keys, log_gates, log_decays))
    if resets is not None:
        # exp(-inf) = 0 says all: no sum below subtracts, so no NaN can come of it.
        decays = decays.masked_fill(resets[..., None], -torch.inf)
    keys, vector, log_scale, *_ = _scan(raw, gates, decays, vector, log_scale)
    return keys.to(raw_keys.dtype), (vector, log_scale)


class _Result(NamedTuple):
    """keys [B, T, H, D], norm [B, T, H] of u, top [B, T, H] (M), and the last vector [B, H, D], log_scale [B, H]."""

    keys: Tensor
    norm: Tensor
    top: Tensor
    vector: Tensor
    log_scale: Tensor


def _forward(raw: Tensor, gates: Tensor, decays: Tensor, vector: Tensor, log_scale: Tensor) -> _Result:
    time = raw.shape[1]
    # Padding steps add nothing (gate -inf) and forget nothing (decay 0): the last state passes through them.
    raw_NBHCD, gates_NBHC, decays_NBHC = _chunks(raw, 0), _chunks(gates, -math.inf), _chunks(decays, 0)
    logs = gates_NBHC[..., :, None] + _sums_between(decays_NBHC)
    within = logs.amax(-2)  # M of the chunk alone, [N, B, H, C]
    since_entry = decays_NBHC.cumsum(-1)
    entries = []
    for local, decay in zip(within[..., -1], since_entry[..., -1], strict=True):
        entries.append(log_scale)
        log_scale = torch.maximum(local, decay + log_scale)
    carried = since_entry + torch.stack(entries)[..., None]
    top = torch.maximum(within, carried)
    u = (logs - top[..., None, :]).exp_().transpose(-1, -2) @ raw_NBHCD
    weights = (carried - top).exp()[..., None]
    entries = []
    for local, weight in zip(u[..., -1, :], weights[..., -1, :], strict=True):
        entries.append(vector)
        vector = torch.addcmul(local, weight, vector)
    u.addcmul_(weights, torch.stack(entries)[..., None, :])
    norm = torch.linalg.vector_norm(u, dim=-1)
    keys = u.mul_(_inverse(norm)[..., None])
    return _Result(_steps(keys, time), _steps(norm, time), _steps(top, time), vector, log_scale)


def _backward(grad_keys, gates, decays, vector, log_scale, keys, norm, top) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of raw keys, gates and decays: one reverse scan of du_t = dloc_t + decay_{t+1} du_{t+1}.

    kbar_t enters the loss through directions only, so <du_t, u_t> = <decay_{t+1} du_{t+1}, u_t>: the gradient of a
    log-gate is the difference of two gradients of log-decays, and the raw keys need not be kept.
    """
    time = keys.shape[1]
    grad_keys = grad_keys.to(keys.dtype)
    direct = (grad_keys - keys * (keys * grad_keys).sum(-1, keepdim=True)) * _inverse(norm)[..., None]
    top_before = torch.cat([log_scale[:, None], top[:, :-1]], dim=1)
    decay_weights = (decays + top_before - top).exp()

    top_NBHC = _chunks(top, None)
    sums = _sums_between(_chunks(decays, 0)) + top_NBHC[..., :, None] - top_NBHC[..., None, :]
    triangle = sums.exp_()  # row j, column i >= j: how much of the gradient at i reaches j
    local = triangle @ _chunks(direct, 0)
    reach = triangle[..., -1]
    first_decays = _chunks(decay_weights, 0)[..., 0]
    carry = torch.zeros_like(local[0, :, :, 0])
    carries = []
    for n in reversed(range(len(local))):
        carries.append(carry)
        first = torch.addcmul(local[n, :, :, 0], reach[n, :, :, :1], carry)
        carry = first * first_decays[n, :, :, None]
    local.addcmul_(reach[..., None], torch.stack(carries[::-1])[..., None, :])
    grad_u = _steps(local, time)

    grad_raw = grad_u * (gates - top).exp()[..., None]
    u_before = torch.cat([vector[:, None], keys[:, :-1] * norm[:, :-1, :, None]], dim=1)
    grad_decays = decay_weights * (grad_u * u_before).sum(-1)
    grad_gates = F.pad(grad_decays[:, 1:], (0, 0, 0, 1)) - grad_decays
    return grad_raw, grad_gates, grad_decays


def _run(raw, gates, decays, vector, log_scale):
    with torch.autocast(raw.device.type, enabled=False):
        result = _forward(raw, gates, decays, vector, log_scale)
    return result.keys, result.vector.contiguous(), result.log_scale.contiguous(), result.norm, result.top


def _fake(raw, gates, decays, vector, log_scale):
    return tuple(raw.new_empty(shape) for shape in (raw.shape, vector.shape, log_scale.shape, gates.shape, gates.shape))


def _keep(ctx, inputs, output):
    _, gates, decays, vector, log_scale = inputs
    keys, last_vector, last_log_scale, norm, top = output
    ctx.mark_non_differentiable(last_vector, last_log_scale, norm, top)
    ctx.save_for_backward(gates, decays, vector, log_scale, keys, norm, top)


def _gradients(ctx, grad_keys, *_):
    return *_scan_backward(grad_keys, *ctx.saved_tensors), None, None


def _run_backward(grad_keys, gates, decays, vector, log_scale, keys, norm, top):
    with torch.autocast(grad_keys.device.type, enabled=False):
        return _backward(grad_keys, gates, decays, vector, log_scale, keys, norm, top)


def _fake_backward(grad_keys, gates, decays, vector, log_scale, keys, norm, top):
    return keys.new_empty(keys.shape), keys.new_empty(gates.shape), keys.new_empty(gates.shape)


_scan = registry.operator(
    "gated_scan_blocked(Tensor raw_keys, Tensor log_gates, Tensor log_decays, Tensor vector, Tensor log_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_scan_backward = registry.operator(
    "gated_scan_blocked_backward(Tensor grad_keys, Tensor log_gates, Tensor log_decays, Tensor vector, Tensor log_scale,"
    " Tensor keys, Tensor norm, Tensor top) -> (Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


def _sums_between(decays: Tensor) -> Tensor:
    """S [..., C, C] from decays [..., C]: S_ji = sum of decays after j up to i for i >= j, else -inf.

    A sum of its own for each j: the difference of two running sums would lose small decays behind a large one.
    """
    size = decays.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=decays.device)
    sums = decays[..., None, :].expand(*decays.shape, size).masked_fill(ones.tril(), 0).cumsum(-1)
    return sums.masked_fill_(ones.tril(-1), -torch.inf)


def _inverse(norm: Tensor) -> Tensor:
    """1 / norm, and 0 for 0."""
    return torch.where(norm == 0, 0, 1 / norm)


def _chunks(x: Tensor, padding: float | None) -> Tensor:
    """[B, T, H, ...] as [N, B, H, C, ...], contiguous, the last chunk filled with `padding` (None: the last step)."""
    batch, time, heads, *rest = x.shape
    size = min(CHUNK, time)
    missing = -time % size
    if missing:
        shape = (batch, missing, heads, *rest)
        x = torch.cat([x, x[:, -1:].expand(shape) if padding is None else x.new_full(shape, padding)], dim=1)
    x = x.reshape(batch, x.shape[1] // size, size, heads, *rest)
    return x.permute(1, 0, 3, 2, *range(4, x.dim())).contiguous()


def _steps(x: Tensor, time: int) -> Tensor:
    """The inverse of `_chunks`: [N, B, H, C, ...] as [B, T, H, ...], contiguous."""
    chunks, batch, heads, size, *rest = x.shape
    x = x.permute(1, 0, 3, 2, *range(4, x.dim())).reshape(batch, chunks * size, heads, *rest)
    return x[:, :time].contiguous()

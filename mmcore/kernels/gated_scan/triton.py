"""The gated scan in Triton: one pass over memory each way.

Two small kernels go ahead over gates and decays alone, 2 / D of the traffic (triton_maxima.py): they find the running
log-maxima M of all steps, and with u_t = exp(-M_t) kbar_t what is left is

    u_t = forget_t u_{t-1} + input_t k~_t,    forget_t = exp(log_decay_t + M_{t-1} - M_t),  input_t = exp(log_gate_t - M_t)

with both factors in [0, 1]. A program has a stretch of W pieces of C steps of one head, all D of it (the norm needs them). A
piece is one warp's: each of its columns lies in one thread, so that a step is a multiply-add and the norm 5 shuffles. Warps
sum up their pieces from nothing, exchange what they end with through shared memory, [W, D] numbers, and add what comes to
them. Triangular products of whole chunks on tensor cores, as linear attention does it, took 94 and 22 barriers a chunk.

Each stretch is a program, and what enters it comes from the program before through memory. k~ is read once, keys are written
once, and the backward pass reads k~ and the upstream gradient once and writes one gradient, however many heads there are
(programs that walk whole heads, or segments of them after a pass that sums these up, took 1.2 to 1.6 times as long, and as
long only forward with two heads a multiprocessor). Few heads would wait for one hop after the other: theirs fold the sums
of those before them in a group of GROUPS[1], and only every GROUPS[1]-th stretch is a hop. The order of all sums is fixed.

Beside k~ and its gradients go gates and decays, the two factors in fp32, and, kept for the backward pass, 1 / |u| of each
step and the state that enters each chunk (1 / 8 of bf16 keys); u is computed again from k~, exactly, where rounded keys
would spoil small gradients.

A NaN reaches every step after it in its text.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import registry, tuning
from mmcore.kernels.gated_scan.triton_kernels import backward_kernel, forward_kernel
from mmcore.kernels.gated_scan.triton_maxima import prepare_kernel, summarize_kernel

CHUNK = 16  # at D = 128 a backward pass over 32 has not the registers
STRETCH = {"forward": (4, 128), "backward": (4, 168)}
"""Chunks of a stretch, and registers of a thread, for 4 and 3 programs a multiprocessor: of the configurations tried on an
H100 within 5 % of the best for many heads and for few."""
GROUPS = (1, 4)  # stretches of a group where heads are as many as multiprocessors, and where they are fewer: 16 at most
WIDE, FOLDED = 256, 8
"""Numbers that a program finds log-maxima of at a time, a step of each segment and head, two for each thread at most; and
blocks of a segment where blocks are folded."""
_LANES = 32


def _config(width: int, pieces: int, registers: int) -> triton.Config:
    """A warp for each piece, two in wide heads, half of one or less in narrow ones; 8 warps at most. Pieces of wide heads,
    whose two warps' exchanges take more, may have all registers."""
    lanes = width // (4 if width >= 128 else 2)  # a thread with single columns is given half of the steps by the compiler
    pieces = min(pieces, 8 * _LANES // lanes)
    constants = {"W": pieces, "V": width // lanes}
    most = registers if width <= 128 and torch.version.hip is None else None
    return triton.Config(constants, num_warps=max(1, pieces * lanes // _LANES), num_stages=1, maxnreg=most)


@functools.cache
def _tuned(which: str, width: int, pieces: int, registers: int) -> tuning.Tuned:
    """One configuration: trying others out would find the words of launches before set."""
    kernel = {"forward": forward_kernel, "backward": backward_kernel}[which]
    return tuning.Tuned(kernel, [_config(width, pieces, registers)], ())


@dataclasses.dataclass(frozen=True)
class _Chain:
    """A launch: its kernel, its grid and what its programs tell one another in."""

    kernel: tuning.Tuned
    width: int
    rows: int
    programs: int
    group: int
    groups: int

    @staticmethod
    def of(which: str, raw: Tensor, width: int) -> _Chain:
        batch, time, heads, _ = raw.shape
        kernel, rows = _tuned(which, width, *STRETCH[which]), batch * heads
        stretches = triton.cdiv(triton.cdiv(time, CHUNK), kernel.configs[0].kwargs["W"])
        group = GROUPS[0 if rows >= tuning.processors(raw) else 1]
        return _Chain(kernel, width, rows, rows * stretches, group, triton.cdiv(stretches, group))

    def scratch(self, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sums [stretches of all rows, width], factors of as many, states [groups of all rows, width])."""
        fp32 = {"dtype": torch.float32, "device": on.device}
        left = self.programs if self.group > 1 else 0
        sums, factors = torch.empty(left, self.width, **fp32), torch.empty(left, **fp32)
        return sums, factors, torch.empty(self.rows * self.groups, self.width, **fp32)


_SUMMARIZE, _PREPARE = (
    tuning.Tuned(kernel, [triton.Config({}, num_warps=4, num_stages=1)], ()) for kernel in (summarize_kernel, prepare_kernel)
)


def _constants(raw: Tensor) -> dict:
    width = max(16, triton.next_power_of_2(raw.shape[3]))
    return {"EVEN": width == raw.shape[3], "C": CHUNK, "D": width}


def _strides(resets: Tensor | None, *tensors: Tensor) -> list[int]:
    found = [n for tensor in tensors for n in tensor.stride()[:3]]
    return found + (list(resets.stride()) if resets is not None else [0, 0])


def _side_by_side(x: Tensor) -> Tensor:
    """x [B, T, H, D] with the numbers of a head next to one another; a copy only where they are not."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _prepare(gates: Tensor, decays: Tensor, resets: Tensor | None, log_scale: Tensor | None, groups: int):
    """(forgets [B, H, (chunks + 1) * C], inputs [B, H, chunks * C], the last log-maximum [B, H]), fp32, and the zeroed words
    of `groups` for each head and a ticket."""
    batch, time, heads = gates.shape
    padded = triton.cdiv(time, CHUNK) * CHUNK
    fp32 = {"dtype": torch.float32, "device": gates.device}
    forgets, inputs = torch.empty(batch, heads, padded + CHUNK, **fp32), torch.empty(batch, heads, padded, **fp32)
    last = torch.empty(batch, heads, **fp32)
    words = torch.empty(batch * heads * groups + 1, dtype=torch.int32, device=gates.device)
    width = min(32, WIDE, triton.next_power_of_2(max(1, heads)))
    segments = min(64, WIDE // width)  # of more the registers spill
    blocks = triton.cdiv(time, segments * CHUNK)
    grid = batch * blocks, triton.cdiv(heads, width)
    summaries = torch.empty(2, batch, blocks if blocks > 1 else 0, heads, **fp32)
    given, strides = (gates, decays, _or(_bytes(resets), gates)), _strides(resets, gates, decays)
    constants = {"RESETS": resets is not None, "C": CHUNK, "W": segments, "H": width}
    if blocks > 1:
        _SUMMARIZE(grid, *given, *summaries, time, heads, *strides, on=gates, **constants)
    _PREPARE(
        grid, *given, _or(log_scale, last), *summaries, forgets, inputs, last, words, time, heads, padded, words.numel(),
        *strides, on=gates, STATE=log_scale is not None, MANY=blocks > 1, F=FOLDED, **constants,
    )  # fmt: skip
    return forgets, inputs, last, words


def _run(raw, gates, decays, resets, vector, log_scale, keep: bool):
    batch, time, heads, size = raw.shape
    raw = _side_by_side(raw)
    constants, chunks = _constants(raw), triton.cdiv(time, CHUNK)
    chain = _Chain.of("forward", raw, constants["D"])
    forgets, inputs, new_log_scale, words = _prepare(gates, decays, resets, log_scale, chain.groups)
    keys = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    fp32 = {"dtype": torch.float32, "device": raw.device}
    new_vector = torch.empty(batch, heads, size, **fp32)
    entries = torch.empty(batch, heads, chunks if keep else 0, size, **fp32)
    inverses = torch.empty(batch, heads, inputs.shape[2] if keep else 0, **fp32)
    chain.kernel(
        (chain.programs,), raw, forgets, inputs, _or(vector, keys), keys, new_vector, entries, inverses, words,
        *chain.scratch(raw), time, heads, size, chain.rows, *raw.stride()[:3], on=raw,
        STATE=vector is not None, KEEP=keep, GROUP=chain.group, **constants,
    )  # fmt: skip
    if not keep:
        forgets, inputs = forgets.new_empty(0), inputs.new_empty(0)
    return keys, new_vector, new_log_scale, entries, inverses, forgets, inputs


def _bytes(resets: Tensor | None) -> Tensor | None:
    return None if resets is None else resets.view(torch.uint8)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """`other` stands where a kernel has a pointer that it will not follow."""
    return other if tensor is None else tensor


def _fake(raw, gates, decays, resets, vector, log_scale, keep):
    batch, time, heads, size = raw.shape
    chunks = (time + CHUNK - 1) // CHUNK
    kept, padded = (chunks, chunks * CHUNK) if keep else (0, 0)

    def fp32(*shape):
        return raw.new_empty(shape, dtype=torch.float32)

    saved = (fp32(batch, heads, padded + CHUNK), fp32(batch, heads, padded)) if keep else (fp32(0), fp32(0))
    entries, inverses = fp32(batch, heads, kept, size), fp32(batch, heads, padded)
    return raw.new_empty(raw.shape), fp32(batch, heads, size), fp32(batch, heads), entries, inverses, *saved


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[3:])


def _gradients(ctx, grad, *_):
    return *_scan_backward(grad, *ctx.saved_tensors), None, None, None, None


def _run_backward(grad, raw, gates, decays, entries, inverses, forgets, inputs):
    grad, raw = _side_by_side(grad), _side_by_side(raw)
    grad_raw = torch.empty(raw.shape, dtype=raw.dtype, device=raw.device)
    grad_gates, grad_decays = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gates, decays))
    constants = _constants(raw)
    chain = _Chain.of("backward", raw, constants["D"])
    words = torch.zeros(chain.rows * chain.groups + 1, dtype=torch.int32, device=raw.device)
    chain.kernel(
        (chain.programs,), grad, raw, forgets, inputs, entries, inverses, grad_raw, grad_gates, grad_decays, words,
        *chain.scratch(raw), *raw.shape[1:], chain.rows, *grad.stride()[:3], *raw.stride()[:3], on=raw,
        GROUP=chain.group, **constants,
    )  # fmt: skip
    return grad_raw, grad_gates, grad_decays


def _fake_backward(grad, raw, gates, decays, entries, inverses, forgets, inputs):
    return raw.new_empty(raw.shape), gates.new_empty(gates.shape), decays.new_empty(decays.shape)


_scan = registry.operator(
    "gated_scan_triton(Tensor raw_keys, Tensor log_gates, Tensor log_decays, Tensor? resets, Tensor? vector, "
    "Tensor? log_scale, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_scan_backward = registry.operator(
    "gated_scan_triton_backward(Tensor grad_keys, Tensor raw_keys, Tensor log_gates, Tensor log_decays, "
    "Tensor entries, Tensor inverses, Tensor forgets, Tensor inputs) -> (Tensor, Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


def gated_scan(
    raw_keys: Tensor,
    log_gates: Tensor,
    log_decays: Tensor,
    resets: Tensor | None = None,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """See `mmcore.kernels.gated_scan.gated_scan`. Sums are fp32. Raises ConfigError for fp64, which would be rounded."""
    if torch.float64 in (raw_keys.dtype, log_gates.dtype, log_decays.dtype):
        raise ConfigError("gated_scan computes in fp32 as 'triton': use implementation='blocked' for fp64")
    vector, log_scale = (None, None) if state is None else (_plain(part) for part in state)
    if raw_keys.shape[1] == 0:
        batch, _, heads, size = raw_keys.shape
        empty = raw_keys.new_zeros(batch, heads, size, dtype=torch.float32)
        none = torch.full_like(empty[..., 0], -torch.inf)
        return torch.zeros_like(raw_keys), (empty, none) if state is None else (vector.clone(), log_scale.clone())
    run = _run if registry.direct(raw_keys) else _scan
    keys, *state = run(raw_keys, log_gates, log_decays, resets, vector, log_scale, torch.is_grad_enabled())[:3]
    return keys, tuple(state)


def _plain(part: Tensor) -> Tensor:
    return part.detach().to(torch.float32).contiguous()

"""The step on a GPU: its launches (triton.py), soon as replays of a CUDA graph.

A graph holds them all, with the addresses they were recorded with; so what changes from token to token lies in tensors that
stay where they are: the token's embedding, the recurrences, the pairs that wait, and a counter of the pairs in each store.
A store that moves (a long-term one that doubles) means another recording.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmcore.kernels.mosaic_step.triton import Step

PATIENCE = 4
"""Tokens after a move until a graph is recorded, which takes longer than some calls: answers of a word or two go without."""


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: torch.cuda.graph's own is of the first that recorded, and each costs a workspace of cuBLAS."""
    return torch.cuda.Stream(device)


@dataclass
class _Bound:
    """A memory as the step's tables know it."""

    memory: Any
    fixed: _Fixed
    keys: weakref.ref[Tensor]
    """Of its store; weak, for the old ones must go as soon as a store has grown."""
    first: int
    """Of its store: pairs may move within their buffer."""

    def holds(self, memory: Any) -> bool:
        """Whether nothing but the step has touched the memory since."""
        store = memory.store
        return (memory is self.memory and self.keys() is store.keys and self.first == store.first
                and memory.pending_key is self.fixed.key)  # fmt: skip


@dataclass
class _Fixed:
    """The tensors of one memory that steps read and write in place."""

    key: Tensor
    raw: Tensor
    vector: Tensor
    log_scale: Tensor
    clock: Tensor
    """int64 [1]: pairs in the store."""

    @staticmethod
    def of(memories: Sequence[Any]) -> tuple[list[_Fixed], Tensor]:
        """Those of each memory, with no numbers yet, and the bytes that they all lie in: one copy keeps what they hold."""
        places, end = [], 0
        for memory in memories:
            for part in (memory.pending_key, memory.pending_raw, *memory.scan, None):
                shape, kind = ((1,), torch.int64) if part is None else (part.shape, part.dtype)
                size = math.prod(shape) * kind.itemsize
                places.append((end, size, shape, kind))
                end += (size + 15) // 16 * 16  # addresses that the kernels take for multiples of 16
        held = torch.empty(end, dtype=torch.uint8, device=memories[0].pending_key.device)
        parts = [held[start : start + size].view(kind).view(shape) for start, size, shape, kind in places]
        return [_Fixed(*parts[n : n + 5]) for n in range(0, len(parts), 5)], held

    def hold(self, memory: Any) -> None:
        """Let the memory's own tensors be these, with the numbers that it has now."""
        theirs = (memory.pending_key, memory.pending_raw, *memory.scan)
        for mine, their in zip((self.key, self.raw, self.vector, self.log_scale), theirs, strict=True):
            mine.copy_(their)
        memory.pending_key, memory.pending_raw, memory.scan = self.key, self.raw, (self.vector, self.log_scale)


class GraphedStep:
    """`step(x, memories, position, padding, last_only) -> logits`, as `mosaic_step` describes it, for one token. Belongs to
    one state."""

    pieces = False  # one token of each row at a time
    takes_ids = False

    def __init__(self, step: Step) -> None:
        self._step = step
        self._bound: list[_Bound] = []
        self._room = 0  # tokens until a store may have to move
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def takes_back(self) -> bool:
        """Whether the next step is worth asking for unseen: one that moves a store may find no memory, or record anew."""
        return self._room >= 1

    def take_back(self, memories: Sequence[Any]) -> None:
        """Undo the last step, once, after which nothing else may have happened to the memories: the pair that it stored will
        be written over, and all else that it changed is as it was before."""
        self._held.copy_(self._before)
        self._room += 1
        for memory in memories:
            memory.store.used -= not memory.store.lent

    def __call__(
        self, x: Tensor, memories: Sequence[Any], position: int, padding: Tensor | None = None, last_only: bool = True
    ) -> Tensor:
        if self._room < 1 or not all(bound.holds(memory) for bound, memory in zip(self._bound, memories, strict=True)):
            self._follow(x, memories, position, padding)
        self._x.copy_(x)
        self._advance()
        # While the card works: the host's part of a token was a tenth of its time.
        self._room -= 1
        for memory in memories:
            memory.store.used += not memory.store.lent
        return self._logits.clone() if last_only else self._logits[:, None].clone()

    def _follow(self, x: Tensor, memories: Sequence[Any], position: int, padding: Tensor | None) -> None:
        """Catch up with memories that are new, have moved, or went on in some other way."""
        self._room = 0
        for memory in memories:
            memory.store.reserve(1, memory.pending_key)
        if len(self._bound) != len(memories) or any(
            bound.memory is not memory or bound.keys() is not memory.store.keys
            for bound, memory in zip(self._bound, memories, strict=True)
        ):
            self._bind(x, memories, padding)
        for bound in self._bound:
            if bound.memory.pending_key is not bound.fixed.key:
                bound.fixed.hold(bound.memory)
            bound.first = bound.memory.store.first
            bound.fixed.clock.fill_(position - bound.first - 1)
        if padding is not None:
            self._starts.copy_(torch.stack([(padding - bound.first).clamp(min=0) for bound in self._bound]))
        stores = [memory.store for memory in memories]
        self._room = min((store.keys.shape[1] - store.used for store in stores if not store.lent), default=1)

    @torch.inference_mode(False)  # what is written in place from now on must not belong to a mode that may end
    def _bind(self, x: Tensor, memories: Sequence[Any], padding: Tensor | None) -> None:
        self._bound, self._graph, self._taken = [], None, 0
        fixed, self._held = _Fixed.of(memories)
        self._before = torch.empty_like(self._held)
        self._x = x.clone()
        shape = (len(fixed), len(x))
        self._starts = None if padding is None else torch.empty(shape, dtype=torch.int32, device=x.device)
        self._step.bind(memories, fixed, self._starts)
        self._bound = [
            _Bound(memory, own, weakref.ref(memory.store.keys), memory.store.first)
            for memory, own in zip(memories, fixed, strict=True)
        ]

    def _advance(self) -> None:
        """One step, from fixed tensors to fixed tensors. The first ones compile the kernels, which no recording may."""
        if self._graph is None and self._taken >= PATIENCE and self._x.is_cuda:
            graph, device = torch.cuda.CUDAGraph(), self._x.device
            # Other threads may go on with their work.
            recording = torch.cuda.graph(graph, stream=_recording_stream(device), capture_error_mode="thread_local")
            with torch.cuda.device(device), recording:
                logits = self._once()
            self._graph, self._logits = graph, logits
        if self._graph is None:
            self._logits = self._once()
        else:
            self._graph.replay()
        self._taken += 1

    def _once(self) -> Tensor:
        self._before.copy_(self._held)
        return self._step(self._x)

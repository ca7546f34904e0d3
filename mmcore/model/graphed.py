"""One-token steps of a Memory Mosaic on a GPU as replays of a CUDA graph.

A step of 24 layers is some 1,500 launches, each of which costs the host more than most of them take on the card. A graph
holds them all, with the addresses they were recorded with; so what changes from token to token lies in tensors that stay
where they are: the token's embedding, the recurrences, the pairs that wait, and a counter of the pairs in each store. A
store that moves (a long-term one that doubles, a short-term one whose end is reached) means a new recording.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmcore.model.state import MemoryState

if TYPE_CHECKING:
    from mmcore.model.language_model import LanguageModel


@dataclass
class _Fixed:
    """The tensors of one memory that a recorded step reads and writes."""

    key: Tensor
    raw: Tensor
    vector: Tensor
    log_scale: Tensor
    clock: Tensor
    """int64 [1]: pairs in the store."""

    @staticmethod
    def of(memory: MemoryState) -> _Fixed:
        clock = torch.tensor([memory.store.used], device=memory.pending_key.device)
        parts = (memory.pending_key, memory.pending_raw, *memory.scan)
        return _Fixed(*(part.clone() for part in parts), clock)

    def lend(self, memory: MemoryState) -> None:
        """Let the memory's step work on these."""
        memory.pending_key, memory.pending_raw, memory.scan = self.key, self.raw, (self.vector, self.log_scale)
        memory.store.clock = self.clock

    def take_back(self, memory: MemoryState) -> None:
        """Copy here what the step has left in the memory."""
        memory.store.clock = None
        vector, log_scale = memory.scan
        new = (memory.pending_key, memory.pending_raw, vector, log_scale)
        for mine, theirs in zip((self.key, self.raw, self.vector, self.log_scale), new, strict=True):
            mine.copy_(theirs)
        memory.pending_key, memory.pending_raw, memory.scan = self.key, self.raw, (self.vector, self.log_scale)

    def follow(self, memory: MemoryState) -> None:
        """Catch up with a memory that went on in some other way."""
        if memory.pending_key is not self.key:
            self.take_back(memory)
            self.clock.fill_(memory.store.used)


class GraphedStep:
    """`step(x, memories, position, padding, last_only) -> logits`, as `mosaic_step` describes it, for one token. Belongs to
    one state: it looks at the weights' addresses when it records."""

    pieces = False  # one token of each row at a time

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._buffers: tuple[int, ...] = ()
        self._fixed: list[_Fixed] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self, x: Tensor, memories: Sequence[MemoryState], position: int, padding: Tensor | None = None,
        last_only: bool = True,
    ) -> Tensor:
        for memory in memories:
            memory.store.reserve(1, memory.pending_key)
        buffers = tuple(memory.store.keys.data_ptr() for memory in memories)
        if buffers == self._buffers:
            for fixed, memory in zip(self._fixed, memories, strict=True):
                fixed.follow(memory)
            self._x.copy_(x)
        else:
            self._fixed = [_Fixed.of(memory) for memory in memories]
            self._memories, self._x = list(memories), x.clone()
            self._record()
            self._buffers = buffers
        self._replay()
        for memory in memories:
            memory.store.used += 1
        return self._logits.clone() if last_only else self._logits[:, None].clone()

    def _body(self) -> None:
        """The step, from fixed tensors to fixed tensors."""
        for fixed, memory in zip(self._fixed, self._memories, strict=True):
            fixed.lend(memory)
        states, x = iter(self._memories), self._x
        delay = self._model.config.long_term_delay
        for layer in self._model.model.layers:
            x = layer.advance(x, {name: next(states) for name in layer.READS}, delay, frozenset(), 1)
        self._logits = self._model.lm_head(self._model.model.norm(x))[:, -1]
        for fixed, memory in zip(self._fixed, self._memories, strict=True):
            fixed.take_back(memory)

    def _record(self) -> None:
        """Run once, so that kernels are compiled and timed outside of the recording; undo that; record."""
        before = [[part.clone() for part in vars(fixed).values()] for fixed in self._fixed]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._body()
        torch.cuda.current_stream().wait_stream(stream)
        for fixed, parts in zip(self._fixed, before, strict=True):
            for part, saved in zip(vars(fixed).values(), parts, strict=True):
                part.copy_(saved)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._body()

    def _replay(self) -> None:
        self._graph.replay()

"""Scoring many continuations of texts that begin alike: what they share is read once.

A `Cursor` is a model that has read one text. Asked for another it goes back to the last point where the two agree
and where it left a mark (`DecodingState.mark`, which copies no stored pair), and reads on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcore.errors import ConfigError, NonFiniteError
from mmcore.generation.engine import PREFILL_CHUNK

CPU_BYTES, GPU_BYTES = 32 << 20, 4 << 30
"""Memory that copies of the state may take where several continuations are read side by side. On a CPU a copy of a
long context costs more than the second pass it saves; a GPU is idle without rows. Long-term memories are not copied
for continuations shorter than their delay."""

PADDING = 0.25
"""Share of the tokens that are read side by side which may be padding."""

ROOM = 64
"""Tokens that a continuation may have before stored pairs are moved."""


@dataclass(frozen=True)
class Scored:
    """A continuation in its context."""

    logprob: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens was the most likely one."""


class Cursor:
    """A model with the memories of one text, which it can partly forget again."""

    def __init__(self, model: Any, chunk: int = PREFILL_CHUNK, copies_bytes: int | None = None) -> None:
        """`copies_bytes`: memory for rows read side by side; 0: one at a time; None: by the device."""
        self.model = model
        self.chunk = chunk
        self.device = next(model.parameters()).device
        default = CPU_BYTES if self.device.type == "cpu" else GPU_BYTES
        self.copies_bytes = default if copies_bytes is None else copies_bytes
        self.tokens_read = 0
        self._state = model.new_state(1)
        self._ids: list[int] = []  # what the last mark has read
        self._marks: list[tuple[int, Any, Tensor | None]] = [(0, self._state.mark(), None)]

    def seek(self, ids: Sequence[int]) -> Tensor:
        """Have exactly `ids` read: log-probabilities [V] fp32 of what comes next. The place is marked."""
        ids = list(ids)
        if not ids:
            raise ConfigError("the prompt is empty: give at least one token, such as the tokenizer's bos_id")
        while len(ids) < self._marks[-1][0] or self._ids[: self._marks[-1][0]] != ids[: self._marks[-1][0]]:
            self._marks.pop()
        done, mark, after = self._marks[-1]
        self._state.rewind(mark)
        if done == len(ids):
            return after
        for start in range(done, len(ids), self.chunk):
            logits = self._advance(ids[start : start + self.chunk], last_only=True)
        after = log_probabilities(logits[0])
        self._ids = ids
        self._marks.append((len(ids), self._state.mark(ROOM), after))
        return after

    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Each continuation (at least a token) behind the context (at least a token)."""
        before = self.seek(context)
        here = self._marks[-1][1]
        shared = shared_length(continuations)
        shared = min(shared, min(map(len, continuations)) - 1)
        total, greedy = torch.zeros((), device=self.device), torch.ones((), dtype=torch.bool, device=self.device)
        mark = here
        if shared:
            head = list(continuations[0][:shared])
            rows = log_probabilities(self._advance(head, last_only=False)[0])
            total, greedy = _along(torch.cat([before[None], rows[:-1]]), head)
            before, mark = rows[-1], self._state.mark(ROOM)
        rests = [list(continuation[shared:]) for continuation in continuations]
        found = [Scored(float(total + part), bool(greedy & best)) for part, best in self._rests(rests, before, mark)]
        self._state.rewind(here)
        if any(one.logprob != one.logprob for one in found):
            raise NonFiniteError(
                "the model's log-probabilities are not numbers: the weights are damaged, or too large for this dtype"
            )
        return found

    def _rests(self, rests: list[list[int]], before: Tensor, mark: Any) -> list[tuple[Tensor, Tensor]]:
        """(log-probability, whether greedy) of each continuation from the state as it is at `mark`."""
        found = [_along(before[None], rest[:1]) for rest in rests]
        for group in self._groups([len(rest) - 1 for rest in rests]):
            self._state.rewind(mark)
            width = max(len(rests[index]) for index in group) - 1
            tokens = [rests[index][:-1] + [0] * (width + 1 - len(rests[index])) for index in group]
            logits = self._read_rows(tokens)
            for row, index in zip(logits, group, strict=True):
                rest = rests[index]
                more, best = _along(log_probabilities(row[: len(rest) - 1]), rest[1:])
                first, first_best = found[index]
                found[index] = first + more, first_best & best
        return found

    def _groups(self, counts: list[int]) -> Iterator[list[int]]:
        """Which of `counts`, tokens to read, are read side by side: of like length, as many as memory has room for."""
        order = sorted((index for index, count in enumerate(counts) if count), key=counts.__getitem__, reverse=True)
        while order:
            width = counts[order[0]]
            most = max(1, self.copies_bytes // max(1, self._state.branch_bytes(self._lent(width))))
            size = tokens = 0
            while size < min(most, len(order)):
                tokens += counts[order[size]]
                if tokens < (1 - PADDING) * width * (size + 1):
                    break
                size += 1
            yield order[:size]
            order = order[size:]

    def _lent(self, tokens: int) -> set[str]:
        """Memories of which the next so many tokens read only what is there already."""
        shorter = tokens < self.model.config.long_term_delay
        return {name for name in self._state.memories if shorter and name.endswith(".long_term")}

    def _read_rows(self, tokens: list[list[int]]) -> Tensor:
        """Logits [rows, T, V] of rows that each go on from the present state, which is lost for one row."""
        if len(tokens) == 1:
            return self._advance(tokens[0], last_only=False)
        state = self.model.new_state(len(tokens))
        state.branch(self._state, len(tokens[0]), self._lent(len(tokens[0])))
        self.tokens_read += sum(map(len, tokens))
        return self.model.advance(torch.tensor(tokens, device=self.device), state, last_only=False)

    def _advance(self, ids: list[int], last_only: bool) -> Tensor:
        self.tokens_read += len(ids)
        return self.model.advance(torch.tensor([ids], device=self.device), self._state, last_only=last_only)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax in fp32 or better."""
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with alike."""
    first, last = min(rows), max(rows)  # in lexical order all others lie between them
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _along(rows_TV: Tensor, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of ids, one from each row, and whether each is its row's greatest."""
    index = torch.tensor(ids, device=rows_TV.device)
    return rows_TV.gather(1, index[:, None]).sum(), (rows_TV.argmax(-1) == index).all()

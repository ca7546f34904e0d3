"""Reading token shards: one long stream of tokens for each source, with some of its documents left out.

A `Stream` is a list of runs, stretches of shards that follow one another; the training stream is a source less its
held-out documents, the validation stream those alone. Runs are few (about twice the number of held-out documents),
tokens stay memory-mapped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mmcore.data.shards import Shard, ShardSet
from mmcore.errors import DataError

_OPEN_MAPS = 256  # a memory map holds a file descriptor, of which a process has 1,024 by default


class Run(NamedTuple):
    """`length` tokens from `start` of shard number `shard`."""

    shard: int
    start: int
    length: int


class Stream:
    """The chosen documents of one source, end to end.

    `tokens`, `documents` and `bytes` (UTF-8 bytes of their text) count what was chosen.
    """

    def __init__(self, shards: ShardSet, name: str, runs: Sequence[Run], documents: int, text_bytes: int):
        self.shards, self.name, self.runs = shards, name, tuple(runs)
        self.documents, self.bytes = documents, text_bytes
        lengths = np.array([run.length for run in self.runs], dtype=np.int64)
        self._ends = np.cumsum(lengths) if len(lengths) else np.zeros(0, np.int64)
        self.tokens = int(self._ends[-1]) if len(lengths) else 0
        self._maps: OrderedDict[tuple[int, str], np.ndarray] = OrderedDict()

    def read(self, start: int, count: int) -> np.ndarray:
        """Token ids [start, start + count) of the stream, fewer at its end; int64."""
        return self._gather(start, count, ".bin", self.shards.dtype)

    def read_mask(self, start: int, count: int) -> np.ndarray:
        """Whether the loss counts those tokens as targets; bool. All of them, but in conversations."""
        if not self.shards.masked:
            return np.ones(max(0, min(count, self.tokens - start)), dtype=bool)
        return self._gather(start, count, ".mask", np.dtype(np.uint8)).astype(bool)

    def _gather(self, start: int, count: int, ending: str, dtype: np.dtype) -> np.ndarray:
        stop = min(start + count, self.tokens)
        result = np.empty(max(0, stop - start), dtype=np.int64)
        run_index = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(result):
            run = self.runs[run_index]
            inside = start + filled - (int(self._ends[run_index]) - run.length)
            taken = min(run.length - inside, len(result) - filled)
            tokens = self._map(run.shard, ending, dtype)
            result[filled:filled + taken] = tokens[run.start + inside:run.start + inside + taken]
            filled += taken
            run_index += 1
        return result

    def _map(self, shard: int, ending: str, dtype: np.dtype) -> np.ndarray:
        key = (shard, ending)
        if key in self._maps:
            self._maps.move_to_end(key)
        else:
            path = self.shards.shards[shard].stem.with_suffix(ending)
            try:
                self._maps[key] = np.memmap(path, dtype=dtype, mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"{path} cannot be read ({error}): start again, and it is made anew") from None
            if len(self._maps) > _OPEN_MAPS:
                self._maps.popitem(last=False)
        return self._maps[key]

    def document_lengths(self) -> np.ndarray:
        """int64 [n]: tokens of each document, or part of one that a run cuts off, in stream order; they sum to
        `tokens`."""
        lengths = [np.zeros(0, np.int64)]
        for run in self.runs:
            table = np.asarray(self.shards.documents(self.shards.shards[run.shard])["tokens"]).astype(np.int64)
            ends = np.cumsum(table)
            stop = run.start + run.length
            first, last = np.searchsorted(ends, run.start, side="right"), np.searchsorted(ends, stop, side="left")
            chosen = slice(int(first), int(last) + 1)
            lengths.append(np.minimum(ends[chosen], stop) - np.maximum(ends[chosen] - table[chosen], run.start))
        return np.concatenate(lengths)


@dataclass(frozen=True)
class TokenStore:
    """Streams that samples are drawn from. `weights`: one for each stream, or None (by size, each token once).

    `begin_id` and `end_id` frame every document.
    """

    streams: tuple[Stream, ...]
    weights: tuple[float, ...] | None
    begin_id: int
    end_id: int
    kind: str = "text"
    fingerprint: dict = field(default_factory=dict, compare=False)

    @property
    def tokens(self) -> int:
        return sum(stream.tokens for stream in self.streams)

    @property
    def documents(self) -> int:
        return sum(stream.documents for stream in self.streams)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of text behind the tokens."""
        return sum(stream.bytes for stream in self.streams)


def select(shards: ShardSet, name: str, chosen: Callable[[np.ndarray], np.ndarray]) -> Stream:
    """The stream of documents for whose records (DOCUMENT [n]) `chosen` is true."""
    runs: list[Run] = []
    documents = text_bytes = 0
    for number, shard in enumerate(shards.shards):
        table = shards.documents(shard)
        keep = chosen(table)
        documents += int(keep.sum())
        text_bytes += int(table["bytes"][keep].sum())
        runs += [Run(number, start, length) for start, length in _stretches(shard, table, keep)]
    return Stream(shards, name, runs, documents, text_bytes)


def _stretches(shard: Shard, table: np.ndarray, keep: np.ndarray) -> list[tuple[int, int]]:
    """(start, length) in tokens of each unbroken stretch of kept documents."""
    if keep.all():
        return [(0, shard.tokens)]
    ends = np.cumsum(np.asarray(table["tokens"]).astype(np.int64))
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    token_edges = np.concatenate([[0], ends])[edges]
    return [(int(start), int(stop - start)) for start, stop in zip(token_edges[::2], token_edges[1::2], strict=True)]

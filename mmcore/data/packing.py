"""Streams cut into training windows of T + 1 tokens, and the sample behind every global index.

Text: a window starts every T tokens and is T + 1 long, so that each token of the stream but the first is a target
exactly once and nothing is wasted; the last window of a stream is filled up. Conversations stay whole: each goes
into the first window with room for it, the rest of a window is filled up. Filling is a document of its own that no
loss counts.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from typing import NamedTuple, Protocol

import numpy as np

from mmcore.data.order import Permutation, Schedule
from mmcore.data.store import Stream, TokenStore
from mmcore.errors import DataError


class Sample(NamedTuple):
    """A window: `tokens` int64 [T+1], `documents` int32 [T+1] (equal = same document, ascending from 0),
    `trained` bool [T+1] (whether the loss counts the token as a target)."""

    tokens: np.ndarray
    documents: np.ndarray
    trained: np.ndarray


class Windows(Protocol):
    """The windows of one stream, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class TextWindows:
    """Windows over a stream of framed documents. A document cut by a window's edge is two documents."""

    def __init__(self, stream: Stream, sequence_length: int, begin_id: int, end_id: int):
        self._stream, self._length = stream, sequence_length
        self._begin, self._end = begin_id, end_id

    def __len__(self) -> int:
        return -(-(self._stream.tokens - 1) // self._length) if self._stream.tokens > 1 else 0

    def __getitem__(self, index: int) -> Sample:
        size = self._length + 1
        tokens = self._stream.read(index * self._length, size)
        starts = tokens == self._begin
        if self._begin == self._end:  # one token does both: a begin is what follows an end
            starts[1:] &= tokens[:-1] == self._end
        starts[:1] = False
        documents = np.cumsum(starts, dtype=np.int32)
        return _filled(tokens, documents, np.ones(len(tokens), dtype=bool), size, self._end)


class ConversationWindows:
    """Windows that hold whole conversations, first fit in order.

    `cut` counts conversations longer than a window, whose end is left out; `lost` those of them that keep no token to
    learn and are left out as a whole, so that every window has a label.
    """

    def __init__(self, stream: Stream, sequence_length: int, end_id: int):
        self._stream, self._size, self._end = stream, sequence_length + 1, end_id
        lengths = stream.document_lengths()
        starts = np.cumsum(lengths) - lengths
        longer = np.flatnonzero(lengths > self._size)
        lost = [n for n in longer if not stream.read_mask(int(starts[n]), self._size).any()]
        self.cut, self.lost = len(longer), len(lost)
        self._starts, self._lengths = np.delete(starts, lost), np.minimum(np.delete(lengths, lost), self._size)
        self._windows = first_fit(self._lengths.tolist(), self._size)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Sample:
        tokens, documents, trained = [], [], []
        for number, which in enumerate(self._windows[index]):
            start, length = int(self._starts[which]), int(self._lengths[which])
            tokens.append(self._stream.read(start, length))
            trained.append(self._stream.read_mask(start, length))
            documents.append(np.full(length, number, dtype=np.int32))
        return _filled(np.concatenate(tokens), np.concatenate(documents), np.concatenate(trained), self._size, self._end)


def _filled(tokens: np.ndarray, documents: np.ndarray, trained: np.ndarray, size: int, filler: int) -> Sample:
    """The sample filled up to `size` tokens with a document that is not trained."""
    missing = size - len(tokens)
    if missing:
        tokens = np.concatenate([tokens, np.full(missing, filler, dtype=np.int64)])
        documents = np.concatenate([documents, np.full(missing, documents[-1] + 1, dtype=np.int32)])
        trained = np.concatenate([trained, np.zeros(missing, dtype=bool)])
    return Sample(tokens, documents, trained)


def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Which items share a bin: each goes into the first bin with room for it, in order. O(n log n).

    `rest` is a tree of maxima: leaf n holds the room left in bin n, every inner node the largest below it.
    """
    leaves = 1 << max(0, (len(lengths) - 1).bit_length())
    rest = [room] * (2 * leaves)
    bins: list[list[int]] = []
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node = 2 * node if rest[2 * node] >= length else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        rest[node] -= length
        while node > 1:
            node //= 2
            rest[node] = max(rest[2 * node], rest[2 * node + 1])
    return bins


class Samples:
    """The sample of every global index i >= 0: a pure function of the store, T, the seed and i.

    `len(samples)` windows are an epoch. Without weights an epoch holds every window of every stream once, in an
    order of its own. With weights each stream is gone through in epochs of its own, and the schedule says which
    stream is next. `shuffle=False` (validation): windows in order, the same every time; with `limit`, only so many,
    spread evenly over all. `cut` counts conversations longer than a window, `lost` those that keep nothing to learn and
    are left out: of validation that may be all of them, and then there is no window.

    Raises DataError where there is no text, or (`shuffle`: to train on) no conversation with a word to learn.
    """

    def __init__(self, store: TokenStore, sequence_length: int, seed: int = 0, *, shuffle: bool = True,
                 limit: int | None = None):
        self.store, self.sequence_length, self.seed = store, sequence_length, seed
        self._windows = [_windows(stream, store, sequence_length) for stream in store.streams]
        lost = [getattr(windows, "lost", 0) for windows in self._windows]
        self.cut, self.lost = sum(getattr(windows, "cut", 0) for windows in self._windows), sum(lost)
        sizes = [len(windows) for windows in self._windows]
        self._ends = list(itertools.accumulate(sizes))
        self._total = sum(sizes)
        if self._total == 0 and not self.lost:
            raise DataError("the data holds no text to make a sample of: check data.sources and data.validation")
        if self._total == 0 and shuffle:
            raise DataError(
                f"no conversation has a word of the assistant within its first {sequence_length} tokens, so there is "
                f"nothing to learn: raise training.sequence_length, or shorten what comes before"
            )
        self._shuffle = shuffle
        self._length = self._total if limit is None or shuffle else min(max(1, limit), self._total)
        weighted = store.weights is not None and shuffle and len(sizes) > 1
        if weighted and 0 in sizes:
            empty = sizes.index(0)
            name = store.streams[empty].name
            raise DataError(
                f"{name} has a weight, and no conversation there has a word of the assistant within its first "
                f"{sequence_length} tokens: raise training.sequence_length, or remove it from data.sources"
                if lost[empty] else
                f"{name} has a weight but no text left to train on: remove it from data.sources"
            )  # fmt: skip
        self._schedule = Schedule(store.weights) if weighted and store.weights else None
        self._order: dict[tuple[int, int], Permutation] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        source, window = self.locate(index)
        return self._windows[source][window]

    @property
    def identity(self) -> str:
        """Equal exactly where the tokens and their order are, the seed aside: the data's own name, but where conversations
        are left out, which earlier versions packed: a position in their windows means another place here."""
        identity = self.store.fingerprint["identity"]
        return hashlib.sha256(f"{identity}, without {self.lost}".encode()).hexdigest() if self.lost else identity

    def locate(self, index: int) -> tuple[int, int]:
        """(stream, window of the stream) behind a global index."""
        if index < 0:
            raise IndexError(index)
        if not self._shuffle:
            return self._place(index % self._length * self._total // self._length)
        if self._schedule is not None:
            source, before = self._schedule[index]
            epoch, place = divmod(before, len(self._windows[source]))
            return source, self._permutation(source, epoch)[place]
        epoch, place = divmod(index, self._total)
        return self._place(self._permutation(-1, epoch)[place])

    def _place(self, window: int) -> tuple[int, int]:
        source = bisect.bisect_right(self._ends, window)
        return source, window - (self._ends[source - 1] if source else 0)

    def _permutation(self, source: int, epoch: int) -> Permutation:
        """The order of an epoch, of one stream or (-1) of all; the newest of each is kept."""
        key = (source, epoch)
        if key not in self._order:
            size = self._total if source < 0 else len(self._windows[source])
            self._order = {k: v for k, v in self._order.items() if k[0] != source}
            self._order[key] = Permutation(size, self.seed, epoch, source + 1)
        return self._order[key]


def _windows(stream: Stream, store: TokenStore, sequence_length: int) -> Windows:
    if store.kind == "conversations":
        return ConversationWindows(stream, sequence_length, store.end_id)
    return TextWindows(stream, sequence_length, store.begin_id, store.end_id)

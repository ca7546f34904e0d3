"""Which documents are held out for validation.

A document is held out where the hash of its text lies below validation_fraction: the choice does not depend on the
other documents, the tokenizer or the order, and identical documents always fall on the same side. What differs from a
document that is held out in the line ends around it alone is left out of training. Where hashes leave far too little (few
documents), the next ones in the order of their hashes are added; where there are too few documents even for that, the end
of the longest one is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmcore.config import DataConfig
from mmcore.data.shards import ShardSet
from mmcore.data.store import Run, Stream, select

_LARGE = 0.1  # of the text: a document beyond it is not added to reach the fraction


@dataclass(frozen=True)
class HeldOut:
    """Documents whose hash is below `threshold` or among `more` (uint64)."""

    threshold: int
    more: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))

    @classmethod
    def below(cls, fraction: float) -> HeldOut:
        return cls(int(fraction * 2**64))

    def __call__(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each is held out; bool, of the same shape."""
        return (hashes < np.uint64(self.threshold)) | np.isin(hashes, self.more)

    def records(self, table: np.ndarray) -> np.ndarray:
        """The same of DOCUMENT records."""
        return self(np.asarray(table["hash"]))

    @property
    def description(self) -> str:
        added = f", and the next {len(self.more)} in the order of hashes" if len(self.more) else ""
        return f"hash below {self.threshold / 2**64:.6g} of its range{added}"


@dataclass
class Split:
    """Streams of both sides, in the order of the sources; `how` says in words how validation was chosen."""

    train: list[Stream]
    validation: list[Stream]
    how: str
    excluded: int = 0
    """Training documents left out because validation holds the same text, or the same but for line ends around it."""


def choose_held_out(tables: Sequence[np.ndarray], fraction: float, kind: str) -> HeldOut | None:
    """The documents to hold out of `tables` (DOCUMENT records, hash and bytes are read), or None: too few to choose.

    The threshold alone decides where it holds out at least half the fraction of the text. Else documents are added
    by ascending hash, passing over large ones, until the fraction is reached; one document at least stays.
    """
    below = HeldOut.below(fraction)
    total = sum(int(table["bytes"].sum()) for table in tables)
    held = sum(int(table["bytes"][below(table["hash"])].sum()) for table in tables)
    if held >= total * fraction / 2:
        return below
    hashes, where = np.unique(np.concatenate([table["hash"] for table in tables]), return_inverse=True)
    sizes = np.bincount(where, weights=np.concatenate([table["bytes"] for table in tables]))
    open_ = ~below(hashes)
    if kind == "text":
        open_ &= sizes <= _LARGE * total
    more: list[np.uint64] = []
    for value, size in zip(hashes[open_], sizes[open_], strict=True):
        if held >= total * fraction or int(below(hashes).sum()) + len(more) + 1 >= len(hashes):
            break
        more.append(value)
        held += int(size)
    return HeldOut(below.threshold, np.array(more, np.uint64)) if held else None


def split_documents(train: Sequence[ShardSet], validation: Sequence[ShardSet], names: Sequence[str],
                    data: DataConfig) -> Split:
    """Both sides of the data; `names` are those of the training sources, then of the validation sources.

    With validation sources of their own, training documents that also stand there are left out of training.
    """
    if validation:
        kept = [select(s, n, _everything) for s, n in zip(validation, names[len(train):], strict=True)]
        used, excluded = _without(words_of([t for s in validation for t in _tables(s)], _everything), train, names)
        return Split(used, kept, "data.validation", excluded)
    everything = [select(s, n, _everything) for s, n in zip(train, names, strict=True)]
    if data.validation_fraction == 0:
        return Split(everything, [], "none")
    tables = [t for s in train for t in _tables(s)]
    chosen = choose_held_out(tables, data.validation_fraction, data.kind)
    if chosen is not None:
        kept = [select(s, n, chosen.records) for s, n in zip(train, names, strict=True)]
        used, left_out = _without(words_of(tables, chosen.records), train, names)
        return Split(used, kept, chosen.description, left_out - sum(stream.documents for stream in kept))
    if data.kind == "conversations":
        return Split(everything, [], "none: there is one conversation only")
    return _split_tail(everything, data.validation_fraction)


def words_of(tables: Sequence[np.ndarray], chosen: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The texts of the chosen documents, as hashes that leave out the line ends around them."""
    return np.unique(np.concatenate([table["words"][chosen(table)] for table in tables]))


def _without(words: np.ndarray, train: Sequence[ShardSet], names: Sequence[str]) -> tuple[list[Stream], int]:
    """The sources without documents of these texts, and how many those are."""
    used = [select(s, n, lambda t: ~np.isin(t["words"], words)) for s, n in zip(train, names, strict=False)]
    return used, sum(_count(s) for s in train) - sum(stream.documents for stream in used)


def _everything(table: np.ndarray) -> np.ndarray:
    return np.ones(len(table), dtype=bool)


def _tables(shards: ShardSet) -> Iterator[np.ndarray]:
    return (shards.documents(shard) for shard in shards.shards)


def _count(shards: ShardSet) -> int:
    return sum(shard.documents for shard in shards.shards)


def _split_tail(everything: Sequence[Stream], fraction: float) -> Split:
    """Hold out the end of the longest document, of each of its copies."""
    table = np.concatenate([table for stream in everything for table in _tables(stream.shards)])
    longest = table[np.argmax(table["tokens"])]
    tail = max(2, int(int(longest["tokens"]) * fraction))
    tail_bytes = round(int(longest["bytes"]) * tail / int(longest["tokens"]))
    train, held = [], []
    for stream in everything:
        runs, cuts = [], 0
        for number, shard in enumerate(stream.shards.shards):
            start = at = 0
            for row in stream.shards.documents(shard):
                at += int(row["tokens"])
                if row["words"] == longest["words"]:
                    cut = at - min(tail, int(row["tokens"]))  # a copy with fewer line ends around it is shorter
                    runs.append(Run(number, start, cut - start))
                    cuts += 1
                    start = at
                    if not held:
                        held.append(Stream(stream.shards, stream.name, [Run(number, at - tail, tail)], 1, tail_bytes))
            runs.append(Run(number, start, at - start))
        runs = [run for run in runs if run.length]
        text_bytes = stream.bytes - cuts * tail_bytes
        train.append(Stream(stream.shards, stream.name, runs, stream.documents, text_bytes))
    return Split(train, held, f"the last {tail} tokens of the longest document")

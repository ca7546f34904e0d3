"""Batches for one rank, prepared ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from mmcore.data.packing import Samples
from mmcore.errors import ConfigError

IGNORED = -100
"""The label that no loss counts."""

_AHEAD = 4  # steps prepared ahead


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `tokens` and `labels` int64 [b, T], `documents` int32 [b, T].

    labels[b, t] is the token after tokens[b, t], or -100 where that one starts another document or is not trained.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor


def make_batch(samples: Samples, indices: range) -> Batch:
    """The samples of these global indices as one batch."""
    rows = [samples[index] for index in indices]
    tokens = np.stack([row.tokens for row in rows])
    documents = np.stack([row.documents for row in rows])
    trained = np.stack([row.trained for row in rows])
    counted = trained[:, 1:] & (documents[:, 1:] == documents[:, :-1])
    labels = np.where(counted, tokens[:, 1:], IGNORED)
    # contiguous copies: a view of T + 1 columns would make every kernel copy it
    return Batch(*(torch.from_numpy(np.ascontiguousarray(part)) for part in (tokens[:, :-1], labels, documents[:, :-1])))


class Loader:
    """Iterates over optimizer steps; each is the list of this rank's micro-batches.

    Step s holds the samples start + [s * batch_size, (s + 1) * batch_size) over all ranks; this rank takes the
    rank-th of world_size even slices of them, in micro-batches of `micro_batch_size` (None: all at once). `stop`
    ends the iteration at that sample, with a shorter last step; without it the steps never end. `position` is the
    global index of the first sample not given out yet: a Loader with start=position goes on exactly.

    Use it in a `with` block, or call `close`. What fails while preparing is raised where the step would have come.
    """

    def __init__(self, samples: Samples, batch_size: int, micro_batch_size: int | None = None, rank: int = 0,
                 world_size: int = 1, start: int = 0, stop: int | None = None):
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not among {world_size} ranks")
        if batch_size < world_size:
            raise ConfigError(f"training.batch_size {batch_size} is below the {world_size} ranks: make it larger")
        self.position = start
        self._samples, self._batch_size = samples, batch_size
        self._micro_batch_size = micro_batch_size or batch_size
        self._rank, self._world_size, self._stop = rank, world_size, stop
        self._ready: queue.Queue[tuple[int, list[Batch]] | BaseException | None] = queue.Queue(_AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._prepare, args=(start,), name="loader", daemon=True)
        self._thread.start()

    def _prepare(self, position: int) -> None:
        try:
            while not self._closing.is_set() and (self._stop is None or position < self._stop):
                end = position + self._batch_size if self._stop is None else min(
                    position + self._batch_size, self._stop)
                self._put((end, self._step(position, end)))
                position = end
            self._put(None)
        except BaseException as error:  # noqa: BLE001 (whatever it is, the consumer must hear of it)
            self._put(error)

    def _step(self, start: int, end: int) -> list[Batch]:
        count = end - start
        first = start + count * self._rank // self._world_size
        last = start + count * (self._rank + 1) // self._world_size
        size = self._micro_batch_size
        return [make_batch(self._samples, range(at, min(at + size, last))) for at in range(first, last, size)]

    def _put(self, item: tuple[int, list[Batch]] | BaseException | None) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[list[Batch]]:
        while not self._closing.is_set():
            item = self._ready.get()
            if item is None or isinstance(item, BaseException):
                self.close()
                if item is not None:
                    raise item
                return
            self.position, step = item
            yield step

    def close(self) -> None:
        """Stop the thread. Steps prepared but not given out are dropped; `position` does not count them."""
        self._closing.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

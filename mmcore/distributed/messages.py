"""Short messages between the ranks: flags, errors, names of files, as JSON over the control group.

The control group is gloo on every machine, so that a message never waits for the work queued on a GPU. Every rank
must make the same calls in the same order, from its main thread. torch.distributed has all_gather_object for this;
it pickles, and what is pickled here would be run there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmcore.distributed.mesh import World

T = TypeVar("T")

GLANCE = 0.02
"""Seconds between two looks at work that is waited for."""


class Messages:
    """What the ranks of `world` tell one another. In a world of one every message is its own answer."""

    def __init__(self, world: World):
        self.rank, self.size = world.rank, world.size
        self._group = world.control

    def all(self, flag: bool) -> bool:
        """Whether every rank says so."""
        if self.size == 1:
            return flag
        value = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self._group)
        return bool(value.item())

    def share(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, at every rank. Values are what JSON can hold."""
        if self.size == 1:
            return [value]
        data = _encoded(value)
        sizes = self._sizes(data)
        received = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]
        dist.all_gather(received, _padded(data, max(sizes)), group=self._group)
        return [_decoded(part, size) for part, size in zip(received, sizes, strict=True)]

    def each(self, work: Callable[[], T]) -> T:
        """Do `work` on every rank; all return once all are done, however long that takes.

        Nobody waits inside a message, whose time is bounded: the ranks look at one another now and then. `work` runs in
        a thread and must not talk to other ranks; what it raises is raised here, on the ranks where it does.
        """
        if self.size == 1:
            return work()
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(work)
            while not self.all(result.done()):
                time.sleep(GLANCE)
        return result.result()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks at rank 0, and nothing elsewhere: for messages too long to send to everyone."""
        if self.size == 1:
            return [value]
        data = _encoded(value)
        sizes = self._sizes(data)
        received = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes] if self.rank == 0 else None
        dist.gather(_padded(data, max(sizes)), received, group=self._group, group_dst=0)
        if received is None:
            return []
        return [_decoded(part, size) for part, size in zip(received, sizes, strict=True)]

    def _sizes(self, data: bytes) -> list[int]:
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self._group)
        return sizes.tolist()


def _encoded(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _padded(data: bytes, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(data.ljust(size)), dtype=torch.uint8)


def _decoded(part: torch.Tensor, size: int) -> Any:
    return json.loads(part[:size].numpy().tobytes())

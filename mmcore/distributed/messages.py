"""Short messages between the ranks: flags, errors, names of files, as JSON over the control group.

The control group is gloo on every machine, so that a message never waits for the work queued on a GPU. Every rank
must make the same calls in the same order, from its main thread. torch.distributed has all_gather_object for this;
it pickles, and what is pickled here would be run there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmcore.distributed.mesh import World
from mmcore.errors import MMError

T = TypeVar("T")


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

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here; where it raises an MMError on any rank, all ranks raise one.

        For work that ranks do each for itself and that must not end on some of them only.
        """
        result, error = None, None
        try:
            result = work()
        except MMError as caught:
            if self.size == 1:
                raise
            error = caught
        sentences = self.share(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise MMError(f"rank {rank}: {sentence}")
        return result

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

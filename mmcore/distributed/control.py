"""Small facts that all ranks must share: over the control group, on CPU tensors, so that no GPU is waited for.

In a world of one they cost nothing and start nothing.
"""

from __future__ import annotations

import torch

from mmcore.distributed.mesh import World

_TEXT_BYTES = 1024


def highest(value: int, world: World) -> int:
    """The largest `value` of all ranks. Every rank must call it, at the same point."""
    if world.size == 1:
        return value
    import torch.distributed as dist  # a run of one process does without: it takes a second to import

    shared = torch.tensor(value)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=world.control)
    return int(shared)


def texts(own: str, world: World) -> list[str]:
    """Each rank's text, cut after 1,024 bytes, by rank. Every rank must call it, at the same point."""
    if world.size == 1:
        return [own]
    import torch.distributed as dist

    sent = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
    data = own.encode()[:_TEXT_BYTES]
    if data:
        sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    received = [torch.empty_like(sent) for _ in range(world.size)]
    dist.all_gather(received, sent, group=world.control)
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="ignore") for one in received]

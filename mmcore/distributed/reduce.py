"""Sums over the processes that train together. In a world of one they cost nothing and start nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmcore.distributed.mesh import World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def total(value: Tensor, world: World) -> Tensor:
    """`value` summed over all ranks, in place where there are several. Host memory goes over the control group."""
    return _sum(value, world.control if value.is_cpu else None) if world.size > 1 else value


def total_over_shards(value: Tensor, world: World) -> Tensor:
    """`value` summed over the ranks that hold the pieces of one copy of the weights, in place."""
    return _sum(value, world.shard_group) if world.size > 1 else value


def _sum(value: Tensor, group: ProcessGroup | None) -> Tensor:
    import torch.distributed as dist

    dist.all_reduce(value, group=group)
    return value


def agreed(flag: bool, world: World) -> bool:
    """Whether any rank raised `flag`: ranks that disagree about stopping would wait for one another for ever."""
    return bool(total(torch.tensor(int(flag)), world).item()) if world.size > 1 else flag


def highest(value: int, world: World) -> int:
    """The largest `value` of all ranks; each must ask at the same point. Over the control group: no GPU is waited for."""
    if world.size == 1:
        return value
    import torch.distributed as dist

    shared = torch.tensor(value)
    dist.all_reduce(shared, dist.ReduceOp.MAX, group=world.control)
    return int(shared)

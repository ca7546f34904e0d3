"""Sums over the processes that train together. In a world of one they cost nothing and start nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmcore.distributed.mesh import World


def total(value: Tensor, world: World) -> Tensor:
    """`value` summed over all ranks, in place where there are several."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def agreed(flag: bool, world: World, device: torch.device) -> bool:
    """Whether any rank raised `flag`: ranks that disagree about stopping would wait for one another for ever."""
    if world.size == 1:
        return flag
    return bool(total(torch.tensor(int(flag), device=device), world).item())

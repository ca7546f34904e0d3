"""Which process this is among how many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from mmcore.errors import HardwareError


@dataclass(frozen=True)
class World:
    """The processes that train together; a single one unless a launcher set the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: Any = None
    """The gloo group for messages between ranks (torch.distributed's default group where it is none)."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


def world_from_environment() -> World:
    """The world that torchrun describes (RANK, WORLD_SIZE, LOCAL_RANK), or one process.

    Raises HardwareError for more than one: every rank would train a model of its own and call it the same run.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise HardwareError(
            f"WORLD_SIZE is {size}, but training runs in one process: start `mm` without torchrun, or unset WORLD_SIZE"
        )
    return World(int(os.environ.get("RANK", "0")), size, int(os.environ.get("LOCAL_RANK", "0")))

"""Which process this is among how many, and what the processes share: a mesh, a control group, a store."""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mmcore.config import DistributedConfig
from mmcore.config.words import whole_number
from mmcore.errors import ConfigError, HardwareError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store
    from torch.distributed.device_mesh import DeviceMesh

SHARD, REPLICATE = "shard", "replicate"
"""Names of the mesh's dimensions. Weights are cut along SHARD; hybrid sharding has copies of them along REPLICATE."""


@dataclass(frozen=True)
class World:
    """The processes that train together; a single one unless a launcher set the environment."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The rank among the processes of this node, and so the GPU's number."""
    local_size: int = 1
    """Processes on this node."""
    mesh: DeviceMesh | None = None
    """[SHARD], or [REPLICATE, SHARD] where sharding is hybrid; None in a single process."""
    control: ProcessGroup | None = None
    """A gloo group for messages in host memory, whatever the device; None in a single process."""
    store: Store | None = None
    """Keys and values that all ranks see; None in a single process."""
    timeout_seconds: float = 600.0
    """How long a rank waits for another one's message."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def node(self) -> int:
        """The number of this process's machine."""
        return self.rank // self.local_size

    @property
    def shard_group(self) -> ProcessGroup | None:
        """The processes that hold the pieces of one copy of the weights."""
        return None if self.mesh is None else self.mesh.get_group(SHARD)


def world_from_environment() -> World:
    """The world that torchrun describes (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE), or one process.

    Nothing is connected yet (`start_world`). Raises HardwareError where the variables are no numbers or contradict
    one another.
    """
    size = _number("WORLD_SIZE", 1)
    world = World(_number("RANK", 0), size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", size))
    if not 0 <= world.rank < size or not 0 <= world.local_rank < world.local_size <= size or size % world.local_size:
        raise HardwareError(
            f"RANK {world.rank} of WORLD_SIZE {size} and LOCAL_RANK {world.local_rank} of LOCAL_WORLD_SIZE "
            f"{world.local_size} contradict one another: start the processes with torchrun, with equally many on every node"
        )
    return world


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    number = whole_number(text.strip())
    if number is None:
        raise HardwareError(f"{name} is {text!r} and must be a whole number: start the processes with torchrun")
    return number


def start_world(device: torch.device, distributed: DistributedConfig | None = None) -> World:
    """Connect the processes of `world_from_environment`; in a single one nothing is started.

    The default group is gloo on CPUs, gloo and NCCL on GPUs; `device` is this rank's. Every operation ends within
    distributed.timeout_seconds, with an error if need be. Raises ConfigError where shard_size does not fit the number
    of ranks, HardwareError where the ranks do not find one another.
    """
    distributed, world = distributed or DistributedConfig(), world_from_environment()
    if world.size == 1:
        return world
    unset = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise HardwareError(
            f"WORLD_SIZE is {world.size}, but {' and '.join(unset)} {'is' if len(unset) == 1 else 'are'} not set: start the "
            f"processes with torchrun, or unset WORLD_SIZE to train in this one"
        )
    import torch.distributed as dist  # a run of one process does without: it takes a second to import
    from torch.distributed.device_mesh import init_device_mesh

    shape = _mesh_shape(distributed, world)
    timeout = timedelta(seconds=distributed.timeout_seconds)
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    try:
        # A process may start and stop several worlds, and torchrun ranks several times: each has keys of its own
        store = dist.PrefixStore(f"mm/{_start_key()}/{next(_starts)}", _meeting_point(distributed.timeout_seconds))
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore("groups", store), rank=world.rank, world_size=world.size, timeout=timeout, **options,
        )  # fmt: skip
    except (dist.DistError, ValueError) as error:
        sentence = " ".join(str(error).split())
        raise HardwareError(
            f"the {world.size} ranks did not find one another within {distributed.timeout_seconds:g} s ({sentence}): start "
            f"them all with the same torchrun command, and see that MASTER_ADDR and MASTER_PORT can be reached"
        ) from error
    names = (SHARD,) if len(shape) == 1 else (REPLICATE, SHARD)
    return replace(
        world,
        mesh=init_device_mesh(device.type, shape, mesh_dim_names=names),
        control=dist.new_group(backend="gloo", timeout=timeout),
        store=dist.PrefixStore("control", store),
        timeout_seconds=distributed.timeout_seconds,
    )


_starts = itertools.count()


@functools.cache
def _meeting_point(timeout_seconds: float) -> Store:
    """The store at MASTER_ADDR and MASTER_PORT, which lives as long as this process."""
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_seconds)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return store


def _start_key() -> str:
    """Tells this start of the ranks from earlier ones.

    torchrun gives ranks that it starts again the same store (pytorch#135712), where addresses of dead processes lie.
    MM_START is set by mm's own launcher, the same on every node; the count of torchrun's may differ between nodes.
    """
    return os.environ.get("MM_START") or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _mesh_shape(distributed: DistributedConfig, world: World) -> tuple[int, ...]:
    """[ranks], or [copies, ranks that share one] where sharding is hybrid and there are several copies."""
    if distributed.sharding == "full":
        return (world.size,)
    share = distributed.shard_size or world.local_size
    if world.size % share:
        raise ConfigError(
            f"distributed.shard_size {share} does not divide {world.size} ranks: choose a divisor, or sharding=full"
        )
    return (world.size,) if share == world.size else (world.size // share, share)


def stop_world(world: World) -> None:
    """Leave the groups that `start_world` made."""
    if world.size > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

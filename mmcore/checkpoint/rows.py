"""Which rows of a tensor this rank holds, which of them it writes, and how it reads them back.

A sharded tensor is cut along dimension 0 (distributed/shards.py). Under hybrid sharding every group of ranks holds
the same rows; each tensor is then written by one of the groups, and the tensors take turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcore.distributed.shards import is_sharded, local_rows
from mmcore.errors import CheckpointError


@dataclass(frozen=True)
class Rows:
    """This rank's part of a tensor: `local` are its rows start .. stop-1."""

    local: Tensor
    start: int
    stop: int
    copy: int = 0
    """Which of the groups that hold the same rows this rank belongs to."""
    copies: int = 1
    """How many such groups there are."""


def held(name: str, tensor: Tensor, rank: int = 0, size: int = 1) -> Rows:
    """The rows of `tensor` that this rank holds: all of them unless it is a DTensor.

    Raises CheckpointError for a tensor that is cut in another way than along its first dimension.
    """
    if not is_sharded(tensor):
        return Rows(tensor.detach(), 0, _length(tensor), rank, size)
    mesh, copies, copy, cut = tensor.device_mesh, 1, 0, False
    coordinate = mesh.get_coordinate()
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            copies, copy = copies * mesh.size(dimension), copy * mesh.size(dimension) + coordinate[dimension]
        elif type(placement).__name__ == "Shard" and placement.dim == 0 and not cut:
            cut = True
        else:
            raise CheckpointError(
                f"{name} is laid out over the ranks as {tensor.placements}, and only whole rows can be saved: shard it "
                f"along dimension 0 once"
            )
    local, start = local_rows(tensor.detach()) if cut else (tensor.detach().to_local(), 0)
    return Rows(local, start, start + _length(local), copy, copies)


def written(tensors: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Rows]:
    """What this rank of `size` writes of `tensors`, every rank being asked with the same names in the same order.

    Together the ranks write every row once. Names of which this rank writes nothing are left out.
    """
    mine = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        rows = held(name, tensor, rank, size)
        if number % rows.copies == rows.copy and rows.stop > rows.start:
            mine[name] = rows
    return mine


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor of a checkpoint, without reading it where the mapping knows."""
    specs = getattr(tensors, "specs", None)
    return tuple(tensors[name].shape) if specs is None else specs[name].shape


def rows_of(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Rows start .. stop-1 of a tensor of a checkpoint, reading no more than those where the mapping can do so."""
    read = getattr(tensors, "rows", None)
    return read(name, start, stop) if read is not None else tensors[name][start:stop]


@torch.no_grad()
def read_into(target: Tensor, tensors: Mapping[str, Tensor], name: str) -> None:
    """Fill `target`, plain or sharded, with this rank's rows of tensors[name]; it keeps its dtype and device.

    The shape of the whole must be the target's. Raises CheckpointError as reading does.
    """
    rows = held(name, target)
    if tuple(rows.local.shape) == tuple(target.shape):
        rows.local.copy_(tensors[name])
    elif rows.stop > rows.start:
        rows.local.copy_(rows_of(tensors, name, rows.start, rows.stop))

"""A tensor's rows on this rank. In one process a tensor is plain and has them all.

FSDP2 cuts a tensor along its first dimension: over k ranks the first ones hold ceil(n / k) rows, one may hold
fewer and the last ones none. DTensor is recognized without being imported, which would cost a run of one process
two seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.distributed.mesh import SHARD


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    return hasattr(tensor, "device_mesh")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's rows, sharing their memory with `tensor`."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """This rank's rows and the number of the first of them in the whole tensor."""
    if not is_sharded(tensor):
        return tensor, 0
    mesh = tensor.device_mesh
    dimension = mesh.mesh_dim_names.index(SHARD)
    parts, place = mesh.size(dimension), mesh.get_coordinate()[dimension]
    return local(tensor), min(tensor.shape[0], place * -(-tensor.shape[0] // parts))


def whole(tensor: Tensor) -> Tensor:
    """All rows, on every rank; every rank must ask for the same tensors in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor

"""Sums and agreement over processes; a world of one starts nothing."""

import torch
import torch.distributed as dist

from mmcore.distributed.mesh import World
from mmcore.distributed.reduce import agreed, total


def test_a_world_of_one_needs_no_process_group():
    assert total(torch.tensor(3.0), World()).item() == 3.0
    assert agreed(True, World()) is True
    assert agreed(False, World()) is False
    assert not dist.is_initialized()

"""Sums and agreement over processes; a world of one starts nothing."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmcore.distributed.mesh import World, world_from_environment
from mmcore.distributed.reduce import agreed, total
from mmcore.errors import HardwareError


def test_a_world_of_one_needs_no_process_group():
    assert total(torch.tensor(3.0), World()).item() == 3.0
    assert agreed(True, World(), torch.device("cpu")) is True
    assert agreed(False, World(), torch.device("cpu")) is False
    assert not dist.is_initialized()


def test_the_environment_of_a_single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == World(0, 1, 0) and world_from_environment().is_first
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HardwareError, match="WORLD_SIZE is 2"):
        world_from_environment()


def work(rank, path, results):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    world = World(rank, 2, rank)
    found = (total(torch.tensor(float(rank + 1)), world).item(), agreed(rank == 1, world, torch.device("cpu")))
    results.put((rank, *found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_add_up_and_agree(tmp_path):
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(work, (str(tmp_path / "meet"), results), nprocs=2)
    assert sorted(results.get() for _ in range(2)) == [(0, 3.0, True), (1, 3.0, True)]

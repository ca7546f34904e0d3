"""Sums and agreement over processes; a world of one starts nothing."""

import pytest
import torch
import torch.distributed as dist

from mmcore.distributed.mesh import World, world_from_environment
from mmcore.distributed.reduce import agreed, total
from mmcore.errors import HardwareError


def test_a_world_of_one_needs_no_process_group():
    assert total(torch.tensor(3.0), World()).item() == 3.0
    assert agreed(True, World()) is True
    assert agreed(False, World()) is False
    assert not dist.is_initialized()


def test_the_environment_of_a_single_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == World() and world_from_environment().is_first


def test_the_environment_that_torchrun_sets(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    world = world_from_environment()
    assert (world.rank, world.size, world.local_rank, world.local_size, world.node) == (5, 8, 1, 4, 1)
    assert not world.is_first and not dist.is_initialized()


@pytest.mark.parametrize(("name", "value", "words"), [
    ("RANK", "8", "RANK 8 of WORLD_SIZE 8"),
    ("LOCAL_WORLD_SIZE", "3", "LOCAL_WORLD_SIZE 3 contradict"),
    ("WORLD_SIZE", "many", "WORLD_SIZE is 'many' and must be a whole number"),
])
def test_an_environment_that_makes_no_sense(monkeypatch, name, value, words):
    for key, usual in (("RANK", "1"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(key, usual)
    monkeypatch.setenv(name, value)
    with pytest.raises(HardwareError, match=words):
        world_from_environment()

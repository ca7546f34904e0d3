"""Who is who: the environment that torchrun sets, the shape of the mesh, ranks that do not come."""

import pytest
import torch
import torch.distributed as dist

from mmcore.config import DistributedConfig
from mmcore.distributed.mesh import World, _mesh_shape, start_world, stop_world, world_from_environment
from mmcore.errors import ConfigError, HardwareError
from tests.helpers.ranks import free_port


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


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = start_world(torch.device("cpu"))
    assert world == World() and world.mesh is None and world.shard_group is None and not dist.is_initialized()
    stop_world(world)


@pytest.mark.slow
def test_ranks_that_do_not_come_are_not_waited_for_beyond_the_timeout(monkeypatch):
    values = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": free_port()}
    for name, value in (values | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(HardwareError, match="the 2 ranks did not find one another within 1 s"):
        start_world(torch.device("cpu"), DistributedConfig(timeout_seconds=1))
    assert not dist.is_initialized()


@pytest.mark.parametrize(("size", "local", "share", "shape"), [
    (64, 8, None, (8, 8)), (8, 8, 4, (2, 4)), (8, 8, None, (8,)), (4, 2, 1, (4, 1)),
])
def test_hybrid_sharding_cuts_over_a_node_unless_told_otherwise(size, local, share, shape):
    world = World(size=size, local_size=local)
    assert _mesh_shape(DistributedConfig(sharding="hybrid", shard_size=share), world) == shape
    assert _mesh_shape(DistributedConfig(), world) == (size,)


def test_a_share_that_does_not_divide_the_ranks():
    with pytest.raises(ConfigError, match="shard_size 3 does not divide 8 ranks"):
        _mesh_shape(DistributedConfig(sharding="hybrid", shard_size=3), World(size=8, local_size=8))


def test_a_world_that_nobody_launched_is_told_at_once(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HardwareError, match="WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are not set: start"):
        start_world(torch.device("cpu"))

"""Run as a program: two ranks save a step, and one of them is killed at a change of the disk; kill_driver.py does the
same with one process.

    python -m tests.checkpoint.kill_ranks FOLDER [--every N] [--scenario new|again|purge] [--json FILE]

A first save counts each rank's changes; then one save for each N-th of them (1: all), and for every rename, mkdir and
rmdir, dies there. After each death the other rank must end by itself, the newest whole checkpoint must be the old one or
the new one as it was saved, and the run must be able to save again. Prints the number of deaths by rank.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.writer import CheckpointWriter
from mmcore.distributed.mesh import World
from tests.benchmarks.common import environment
from tests.checkpoint.kill_driver import OPERATIONS, die_at, examine
from tests.checkpoint.small import TIED, moments, save, weights
from tests.helpers.forked_ranks import run_ranks

RARE = ("rename", "mkdir", "rmdir")
SCENARIOS = {"new": (30, {}), "again": (20, {"seed": 99}), "purge": (30, {"keep_last": 1})}


def shard(tensors: dict[str, torch.Tensor], world: World) -> dict[str, DTensor]:
    """The tensors as FSDP2 would cut them."""
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))
    cut = {}
    for name, tensor in tensors.items():
        parts = tensor.chunk(world.size)
        local = parts[world.rank] if world.rank < len(parts) else tensor[:0]
        cut[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())
    return cut


def save_sharded(world: World, run: str, scenario: str, victim: int, count: int) -> Any:
    """Save as `scenario` says; `victim` dies at its count-th change of the disk. Returns the changes this rank made,
    or the error that the other's death was to it."""
    step, options = SCENARIOS[scenario]
    model = shard(weights(TIED, options.get("seed", step)), world)
    optimizer = shard(moments(weights(TIED), step), world)
    saver = CheckpointWriter(run, world, keep_last=options.get("keep_last", 0))
    log = die_at(count) if world.rank == victim else record()
    try:
        saver.save(step, model=model, optimizer=optimizer, state={"position": 1000 * step},
                   config=config_json(TIED, torch.float32, 1, 2), files={"recipe.yaml": b"name: test\n"})  # fmt: skip
        saver.wait()
    except RuntimeError as error:  # gloo: the connection was closed
        return type(error).__name__
    return log


def record() -> list[str]:
    """The names of the changes that this process makes from now on."""
    log: list[str] = []

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def wrapper(*arguments, **options):
            if name != "open" or arguments[1] & os.O_CREAT:
                log.append(name)
            return original(*arguments, **options)

        setattr(os, name, wrapper)

    for name in OPERATIONS:
        wrap(name)
    return log


def deaths(folder: Path, scenario: str, every: int) -> list[int]:
    """Kill each rank at its changes; how many deaths each died. Raises SystemExit where something was lost."""
    template = folder / "template"
    shutil.rmtree(template, ignore_errors=True)
    save(template, 10, config=TIED)
    save(template, 20, config=TIED)
    counts = []
    logs = attempt(folder, scenario, -1, 0)
    for victim, log in enumerate(logs):
        chosen = [n for n, name in enumerate(log, 1) if name in RARE or n % every == 0 or n == len(log)]
        for count in chosen:
            answers = attempt(folder, scenario, victim, count)
            if answers[victim] != -9:
                raise SystemExit(f"{scenario}: rank {victim} was to die at change {count} and answers {answers[victim]}")
        counts.append(len(chosen))
    return counts


def attempt(folder: Path, scenario: str, victim: int, count: int) -> list[Any]:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "template", run)
    answers = run_ranks(2, save_sharded, str(run), scenario, victim, count, may_die=True)
    try:
        examine(run, scenario)
    except AssertionError as error:
        raise SystemExit(f"{scenario}: rank {victim} died at change {count}: {error}") from error
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    died = {name: deaths(options.folder, name, options.every) for name in options.scenario or SCENARIOS}
    print(json.dumps(died))
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "deaths by rank": died}, indent=1) + "\n")


if __name__ == "__main__":
    main()

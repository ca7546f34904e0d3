"""Saving and verifying a training checkpoint, beside what the disk and the libraries allow.

    python -m tests.benchmarks.bench_checkpoint [--megabytes 600] [--folder DIR] [--rounds 3] [--json FILE]
    python -m tests.benchmarks.bench_checkpoint --stall [--megabytes 300] [--ranks 1 2] [...]

With --stall: for how long training stands still when a checkpoint is saved, asynchronously and not, at each number of
ranks. A model of 100 MB has a checkpoint of 300 MB: itself and two moments. The first asynchronous save is told apart,
since it maps the memory that the later ones use again.

Without:
Saving (finite check, hash, write, sync, rename) beside safetensors' save_file with a sync, which does neither
check nor hash. Verifying beside hashlib reading the same files. Both sides alternate; medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.names import expected_tensors
from mmcore.checkpoint.store import save_checkpoint, whole_checkpoints
from mmcore.checkpoint.writer import CheckpointWriter
from mmcore.config import ModelConfig
from mmcore.distributed.mesh import World
from tests.benchmarks.common import environment
from tests.checkpoint.kill_ranks import shard
from tests.helpers.forked_ranks import run_ranks


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def save_with_library(folder: Path, tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    folder.mkdir()
    for stem, group in tensors.items():
        save_file(group, folder / f"{stem}.safetensors")
        with open(folder / f"{stem}.safetensors", "rb+") as file:
            os.fsync(file.fileno())


def hash_files(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")


def model_config(megabytes: int) -> ModelConfig:
    # one weight has 12 bytes: itself and two moments; a quarter of them in the two embedding matrices
    width = 512
    layers = max(1, round(megabytes * 1e6 / 12 / (16 * width * width)))
    return ModelConfig(vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                       num_attention_heads=8)  # fmt: skip


def stalls(world: World, folder: str, megabytes: int, rounds: int) -> dict[str, float]:
    """Seconds on this rank: save asynchronously and not in turns, wait for the end between; medians."""
    config = model_config(megabytes)
    model = {name: torch.randn(shape) for name, shape in expected_tensors(config).items()}
    moments = {f"{m}.{name}": torch.rand_like(t) for m in ("exp_avg", "exp_avg_sq") for name, t in model.items()}
    size = sum(t.numel() * 4 for group in (model, moments) for t in group.values()) / 1e6
    if world.size > 1:
        model, moments = shard(model, world), shard(moments, world)
    writers = {name: CheckpointWriter(folder, world, keep_last=1, asynchronous=name == "asynchronous")
               for name in ("asynchronous", "synchronous")}  # fmt: skip
    times: dict[str, list[float]] = {"asynchronous": [], "synchronous": [], "background": []}
    for step in range(1, 2 * rounds + 3):
        name = "asynchronous" if step % 2 else "synchronous"
        writer = writers[name]
        arguments = dict(model=model, optimizer=moments, state={}, config=config_json(config, torch.float32))
        times[name].append(seconds(partial(writer.save, step, **arguments)))
        writer.wait()
        if name == "asynchronous":
            times["background"].append(writer.timing.background_seconds)
    stall, wait = statistics.median(times["asynchronous"][1:]), statistics.median(times["synchronous"][1:])
    return {"megabytes": size, "first asynchronous stall s": times["asynchronous"][0], "asynchronous stall s": stall,
            "synchronous stall s": wait, "background s": statistics.median(times["background"][1:]),
            "synchronous / asynchronous": wait / stall}  # fmt: skip


def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, float]:
    config = model_config(megabytes)
    model = {name: torch.randn(shape) for name, shape in expected_tensors(config).items()}
    moments = {f"{m}.{name}": torch.rand_like(t) for m in ("exp_avg", "exp_avg_sq") for name, t in model.items()}
    size = sum(t.numel() * 4 for group in (model, moments) for t in group.values()) / 1e6
    times: dict[str, list[float]] = {"save": [], "save_file": [], "verify": [], "hashlib": []}
    for step in range(1, rounds + 1):
        run, plain = folder / "run", folder / "plain"
        arguments = dict(model=model, optimizer=moments, state={}, config=config_json(config, torch.float32))
        times["save"].append(seconds(lambda s=step, r=run, a=arguments: save_checkpoint(r, s, keep_last=1, **a)))
        times["save_file"].append(seconds(lambda p=plain: save_with_library(p, {"model": model, "optimizer": moments})))
        times["verify"].append(seconds(lambda r=run: whole_checkpoints(r)))
        times["hashlib"].append(seconds(lambda p=plain: hash_files(p)))
        shutil.rmtree(plain)
    return rates(size, times)


def rates(size: float, times: dict[str, list[float]]) -> dict[str, float]:
    speeds = {f"{name} MB/s": size / statistics.median(values) for name, values in times.items()}
    ratios = {"save / save_file": speeds["save MB/s"] / speeds["save_file MB/s"],
              "verify / hashlib": speeds["verify MB/s"] / speeds["hashlib MB/s"]}  # fmt: skip
    return {"megabytes": size} | speeds | ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stall", action="store_true", help="how long training stands still")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="with --stall: numbers of gloo ranks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.stall:
            figures = {}
            for ranks in options.ranks:
                run = f"{folder}/{ranks}"
                found = run_ranks(ranks, stalls, run, options.megabytes, options.rounds, timeout=3600)
                slowest = {name: max(answer[name] for answer in found) for name in found[0]}
                slowest["synchronous / asynchronous"] = slowest["synchronous stall s"] / slowest["asynchronous stall s"]
                figures |= {f"{ranks} ranks, {name}": value for name, value in slowest.items()}
        else:
            figures = measure(Path(folder), options.megabytes, options.rounds)
    for name, value in figures.items():
        print(f"{name:40} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()

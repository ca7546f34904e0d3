"""Saving and verifying a training checkpoint, beside what the disk and the libraries allow.

    python -m tests.benchmarks.bench_checkpoint [--megabytes 600] [--folder DIR] [--rounds 3] [--json FILE]

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
from pathlib import Path

import torch
from safetensors.torch import save_file

from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.names import expected_tensors
from mmcore.checkpoint.store import save_checkpoint, whole_checkpoints
from mmcore.config import ModelConfig


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


def measure(folder: Path, megabytes: int, rounds: int) -> dict[str, float]:
    # one weight has 12 bytes: itself and two moments; a quarter of them in the two embedding matrices
    width = 512
    layers = max(1, round(megabytes * 1e6 / 12 / (16 * width * width)))
    config = ModelConfig(vocab_size=4096, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                         num_attention_heads=8)  # fmt: skip
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), options.megabytes, options.rounds)
    for name, value in figures.items():
        print(f"{name:20} {value:10.2f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

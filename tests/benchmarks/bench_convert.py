"""Converting a checkpoint of 1.5b size: peak memory and rate.

    python -m tests.benchmarks.bench_convert [--recipe recipes/1.5b.yaml] [--layers N] [--dtype bfloat16]
        [--to hf torch train] [--folder DIR] [--json FILE]

A synthetic checkpoint of the recipe's shapes is written shard by shard; `mm convert` then runs in a process of its
own, whose peak resident memory the system reports (pages of mapped files included). Beside it stands a process that
only imports what conversion imports, and the bytes of the largest tensor in fp32. MB/s are bytes of the result by
the whole time of the command: hashing the source, writing, comparing all tensors and both models' logits, hashing the
result. The folder needs room for two copies, one more while `train` runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmcore.checkpoint.formats import write_exported
from mmcore.checkpoint.names import expected_tensors
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.config import ModelConfig, load_recipe

NAMES = {"hf": "out", "torch": "model.pt", "train": "run"}


class Drawn(Mapping[str, Tensor]):
    """Random weights of a model, each drawn when it is asked for."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        self.specs = {name: TensorSpec(dtype, shape) for name, shape in expected_tensors(config).items()}

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        sigma = 0.02 if len(spec.shape) > 1 else 0.3
        return torch.empty(spec.shape, dtype=spec.dtype).normal_(0, sigma)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of a command. Raises CalledProcessError."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, command)
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e6


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def measure(folder: Path, config: ModelConfig, dtype: torch.dtype, targets: list[str]) -> dict[str, float]:
    drawn = Drawn(config, dtype)
    largest = max(spec.nbytes for spec in drawn.specs.values()) * 4 / dtype.itemsize
    start = time.perf_counter()
    source = write_exported(folder / "source", config, drawn, dtype=dtype, max_shard_bytes=1_000_000_000)
    figures = {"source MB": size(source) / 1e6, "largest tensor in fp32, MB": largest / 1e6,
               "making the source, s": time.perf_counter() - start}  # fmt: skip
    imports = "import mmcore.checkpoint.convert, mmcore.model.mosaic, mmcore.model.transformer"
    figures["imports alone, peak MB"] = run([sys.executable, "-c", imports])[1]
    for to in targets:
        target = folder / NAMES[to]
        command = [sys.executable, "-m", "mmcli", "convert", str(source), str(target), "--to", to,
                   "--max-shard-size", "1GB"]  # fmt: skip
        seconds, peak = run(command)
        megabytes = size(target) / 1e6
        figures |= {f"{to}: peak MB": peak, f"{to}: s": seconds, f"{to}: MB/s": megabytes / seconds}
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/1.5b.yaml"))
    parser.add_argument("--layers", type=int, help="fewer layers than the recipe's, to try the script")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--to", nargs="+", default=["hf", "torch"], choices=tuple(NAMES))
    parser.add_argument("--folder", type=Path, help="a folder on the disk to use; a temporary one by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = load_recipe(options.recipe).model
    if options.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not fill the disk
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), config, getattr(torch, options.dtype), options.to)
    for name, value in figures.items():
        print(f"{name:32} {value:12.1f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

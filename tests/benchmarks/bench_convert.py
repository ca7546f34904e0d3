"""Converting a checkpoint of 1.5b size: peak memory and rate.

    python -m tests.benchmarks.bench_convert [--recipe recipes/1.5b.yaml] [--layers N] [--dtype bfloat16]
        [--ways train-hf hf-train hf-torch] [--folder DIR] [--json FILE]

Synthetic checkpoints of the recipe's shapes are written: of training in fp32 with both moments, cut into the rows of
8 ranks, and an exported folder in --dtype. `mm convert` then runs in a process of its own, whose peak resident memory
the system reports (pages of mapped files included). Beside it stand a process that only imports what conversion
imports, and the bytes of the largest tensor in fp32. MB/s are bytes of the result by the whole time of the command:
hashing the source, writing, comparing all tensors and both models' logits, hashing the result. What training needs
beside the weights is hashed as well, and read no further for hf. The folder needs room for a training checkpoint
(24 GB at 1.5b) and a result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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

from mmcore.checkpoint.contents import MOMENTS, STATE
from mmcore.checkpoint.formats import write_exported
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.names import expected_tensors
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.config import ModelConfig, load_recipe
from tests.benchmarks import common
from tests.helpers.ranked import write_ranked

RANKS = 8
NAMES = {"hf": "out", "torch": "model.pt", "train": "run"}
_IMPORTS = "import mmcore.checkpoint.convert, mmcore.model.mosaic, mmcore.model.transformer\n"
_CONVERT = "import sys\nfrom mmcli.app import run\nassert run(['convert', *sys.argv[1:]]) == 0\n"
_REPORT = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
_TILE = 4_194_301  # numbers, odd so that no two rows of a matrix are equal


class Drawn(Mapping[str, Tensor]):
    """Random tensors of given specs, each made when it is asked for, by repeating the same numbers."""

    def __init__(self, specs: dict[str, TensorSpec]):
        self.specs = specs
        self._numbers = torch.randn(_TILE, generator=torch.Generator().manual_seed(0))

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        sigma = 0.02 if len(spec.shape) > 1 else 0.3
        count = spec.nbytes // spec.dtype.itemsize
        numbers = (self._numbers * sigma).to(spec.dtype)
        return numbers.repeat(-(-count // _TILE))[:count].view(spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def write_source(kind: str, folder: Path, config: ModelConfig, dtype: torch.dtype) -> Path:
    """A checkpoint to convert: `train` or `hf`."""
    shapes = expected_tensors(config)
    if kind == "hf":
        drawn = Drawn({name: TensorSpec(dtype, shape) for name, shape in shapes.items()})
        return write_exported(folder / "exported", config, drawn, dtype=dtype, max_shard_bytes=1_000_000_000)
    weights = {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}
    moments = {f"{moment}.{name}": spec for moment in MOMENTS for name, spec in weights.items()}
    texts = {"config.json": config_json(config, torch.float32), STATE: {"step": 1000}}
    step = folder / "trained" / "checkpoints" / "step-001000"
    write_ranked(step, 1000, {"model": Drawn(weights), "optimizer": Drawn(moments)}, RANKS,
                 {name: json.dumps(values).encode() for name, values in texts.items()})  # fmt: skip
    return folder / "trained"


def run(code: str, *arguments: str) -> dict[str, float]:
    """What a Python process took: seconds by the clock and of the processor, and peak resident megabytes by /proc's
    account (wait4's is never below what the parent had in memory). Raises CalledProcessError."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code + _REPORT, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"s": seconds, "processor s": worked, "peak MB": int(done.stdout.split()[-2]) * 1024 / 1e6}


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure(folder: Path, config: ModelConfig, dtype: torch.dtype, ways: list[str]) -> dict[str, float]:
    """ways: `from-to`; those from one source follow one another."""
    largest = max(TensorSpec(torch.float32, shape).nbytes for shape in expected_tensors(config).values())
    figures = {"largest tensor in fp32, MB": largest / 1e6, "imports alone, peak MB": run(_IMPORTS)["peak MB"]}
    source, made = None, ""
    for way in ways:
        kind, to = way.split("-")
        if kind != made:
            if source is not None:
                remove(source)
            source, made = write_source(kind, folder, config, dtype), kind
            figures[f"{kind} source, MB"] = size(source) / 1e6
        target = folder / NAMES[to]
        took = run(_CONVERT, str(source), str(target), "--to", to, "--max-shard-size", "1GB",
                   "--dtype", str(dtype).removeprefix("torch."))  # fmt: skip
        figures |= {f"{way}: {name}": value for name, value in took.items()}
        figures[f"{way}: MB/s"] = size(target) / 1e6 / took["s"]
        remove(target)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/1.5b.yaml"))
    parser.add_argument("--layers", type=int, help="fewer layers than the recipe's, to try the script")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    ways = [f"{kind}-{to}" for kind in ("train", "hf") for to in NAMES]
    parser.add_argument("--ways", nargs="+", default=["train-hf", "hf-train", "hf-torch"], choices=ways)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to use; a temporary one by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = load_recipe(options.recipe).model
    if options.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not fill the disk
    where = common.environment()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(Path(folder), config, getattr(torch, options.dtype), options.ways)
    for name, value in figures.items():
        print(f"{name:32} {value:12.1f}")
    common.write(options.json, {"environment": where, "recipe": str(options.recipe), "layers": config.num_hidden_layers,
                                "dtype": options.dtype, "ranks": RANKS, "figures": figures})  # fmt: skip


if __name__ == "__main__":
    main()

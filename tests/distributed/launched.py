"""Runs of several ranks in processes of their own, to be hurt: started with mm's launcher or with torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.tiny_run import tiny_values, write_recipe

ROOT = Path(__file__).parents[2]


def prepare(folder: Path, shared: Path, *, every: int = 5, distributed: dict | None = None, **training) -> None:
    """A recipe in `folder`, whose text and tokens lie in `shared`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = tiny_values(shared, **training)
    values["checkpoint"] |= {"folder": str(folder / "run"), "every": every}
    values["distributed"] = distributed or {}
    write_recipe(folder, values)


class Run:
    """A started run, its output in a file, its ranks known by the first lines of their logs.

    torchrun: start it with torchrun rather than mm's launcher; fault: with a fault of inject.py, also by torchrun.
    nodes: how many launchers there are, of `ranks` ranks each, and where they meet; this is one of them.
    """

    def __init__(self, folder: Path, *options: str, ranks: int = 2, restarts: int = 3, torchrun: bool = False, fault: str = "",
                 nodes: tuple[int, str] | None = None):  # fmt: skip
        self.folder, self.ranks = folder, ranks
        self.output = folder / "output.txt"
        self.begun = self._starts()
        words = ["pretrain", str(folder / "tiny.yaml"), *options]
        torchrun_options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
        if torchrun or fault:
            module = "tests.distributed.inject" if fault else "mmcli"
            command = [sys.executable, "-m", "torch.distributed.run", *torchrun_options, "-m", module, *words]
        else:
            asked = ["--gpus", "0", "--ranks", str(ranks), "--max-restarts", str(restarts)]
            if nodes:
                asked += ["--nodes", str(nodes[0]), "--rdzv", nodes[1]]
            command = [sys.executable, "-m", "mmcli", *words, *asked]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        inherited |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MM_FAULT": fault or "none:0:0"}
        with self.output.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=inherited, cwd=folder)

    def _log(self, rank: int) -> str:
        path = self.folder / "run" / "logs" / f"rank-{rank:05d}.log"
        return path.read_text() if path.exists() else ""

    def _starts(self) -> int:
        """How often rank 0 has been started in this folder."""
        return len(re.findall(r"^--- .* rank 0 of", self._log(0), re.MULTILINE))

    def pid(self, rank: int) -> int:
        """Of the rank's latest process."""
        return int(re.findall(r"^--- .* rank \d+ of \d+, pid (\d+)", self._log(rank), re.MULTILINE)[-1])

    def wait_for_step(self, step: int, starts: int = 1, seconds: float = 180) -> int:
        """Wait until this step is done, by the ranks started for the n-th time since; the newest step."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            done = self.newest_step()
            if self._starts() >= self.begun + starts and done >= step:
                return done
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)
        raise AssertionError(f"ended with {self.process.returncode} before step {step}:\n{self.said()}")

    def newest_step(self) -> int:
        path = self.folder / "run" / "metrics.jsonl"
        rows = [line for line in path.read_text().splitlines() if '"kind": "step"' in line] if path.exists() else []
        return json.loads(rows[-1])["step"] if rows else 0

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send it to a rank, or to the launcher."""
        os.kill(self.process.pid if rank is None else self.pid(rank), number)

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise

    def end(self) -> None:
        """Leave nothing running."""
        if self.process.poll() is not None:
            return
        for pid in [self.pid(rank) for rank in range(self.ranks) if self._log(rank)] + [self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)

    def said(self) -> str:
        return self.output.read_text()


def losses(folder: Path) -> dict:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {(row["kind"], row["step"]): row["loss"] for row in rows if "loss" in row}


def same_end(folder: Path, other: Path, step: int) -> bool:
    """Whether two runs have the same losses, and the same weights and moments to the last bit, at their end."""
    if losses(folder) != losses(other):
        return False
    mine, theirs = (tensors(path / "run" / "checkpoints" / f"step-{step:06d}") for path in (folder, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's files, by file and name."""
    return {
        f"{path.name}/{name}": tensor for path in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }  # fmt: skip

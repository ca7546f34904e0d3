"""Runs many trials, several at a time, each in a process of its own; what is done is not done again."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from mmcore.claims.trial import Task, Trial, run
from mmcore.training.run_folder import replace_text

Progress = Callable[[Trial, dict[str, Any], Sequence[Trial]], None]
"""Called with a trial that has ended, its result, and the trials that have not."""


def result_file(folder: Path, trial: Trial) -> Path:
    return folder / "results" / f"{trial.name.replace('/', '--').replace(' ', '-')}.json"


def identity(trial: Trial, task: Task) -> dict[str, Any]:
    """All that a result depends on but the code: a result with another identity is made again."""
    recipe = trial.load(Path()).as_dict()
    recipe["checkpoint"].pop("folder")
    return json.loads(json.dumps({"recipe": recipe, "task": dataclasses.asdict(task)}))


def finished(folder: Path, trial: Trial, task: Task) -> dict[str, Any] | None:
    """The result of a trial that has been made, else None."""
    try:
        found = json.loads(result_file(folder, trial).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return found["result"] if found.get("identity") == identity(trial, task) else None


def run_all(
    trials: Sequence[tuple[Trial, Task]], folder: Path, processes: int, progress: Progress = lambda *_: None
) -> dict[Trial, dict[str, Any]]:
    """The result of every trial. `progress` hears of each that is new as it ends.

    Raises RuntimeError with the last lines of what a failing trial said; the others are ended.
    """
    results = {trial: found for trial, task in trials if (found := finished(folder, trial, task)) is not None}
    waiting = [(trial, task) for trial, task in trials if trial not in results]
    running: dict[subprocess.Popen, tuple[Trial, Task, IO[bytes]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                trial, task = waiting.pop(0)
                said = tempfile.TemporaryFile()
                running[_start(trial, task, folder, said)] = (trial, task, said)
            for process in [p for p in running if p.poll() is not None]:
                trial, task, said = running.pop(process)
                found = finished(folder, trial, task) if process.returncode == 0 else None
                said.seek(0)
                words = said.read().decode("utf-8", errors="replace")
                said.close()
                if found is None:
                    raise RuntimeError(f"the trial {trial.name} failed: {words[-2000:]}")
                results[trial] = found
                progress(trial, found, [other for other, *_ in (*running.values(), *waiting)])
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
    return results


def _start(trial: Trial, task: Task, folder: Path, said: IO[bytes]) -> subprocess.Popen:
    order = json.dumps({"trial": {**dataclasses.asdict(trial), "recipe": str(trial.recipe)}, "task": task.name})
    return subprocess.Popen(
        [sys.executable, "-m", "mmcore.claims", "--trial", order, "--work", str(folder)],
        stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def run_here(order: str, tasks: dict[str, Task], folder: Path) -> None:
    """Make one trial in this process and write its result, whole or not at all."""
    torch.set_num_threads(1)
    asked = json.loads(order)
    values = asked["trial"]
    trial = Trial(**{**values, "recipe": Path(values["recipe"]), "settings": tuple(values["settings"])})
    task = tasks[asked["task"]]
    found = {"identity": identity(trial, task), "result": run(trial, task, folder)}
    path = result_file(folder, trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(found, indent=1) + "\n")

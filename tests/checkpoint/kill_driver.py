"""Run as a program: save a step and be killed at the n-th change of the disk, for every n.

One process loads torch and forks a child for each n; the child counts calls of os.* and kills itself with SIGKILL
before the n-th, or for a write in the middle of it. After each death the folder is examined. Syncs, closes and
opens for reading are not counted: a kill before or after them leaves the same disk.
Arguments: folder, scenario (new, again, purge). Prints the number of deaths.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from mmcore.checkpoint.store import load_state, whole_checkpoints
from tests.checkpoint.small import TIED, moments, same, save, weights

OPERATIONS = ("open", "write", "rename", "mkdir", "rmdir", "unlink")


def die_at(count: int) -> None:
    """Replace os.* so that this process kills itself at the count-th call, after half of a write."""
    left = count

    def wrap(name):
        original = getattr(os, name)

        def wrapper(*arguments, **options):
            nonlocal left
            left -= name != "open" or bool(arguments[1] & os.O_CREAT)
            if left == 0:
                if name == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, name, wrapper)

    for name in OPERATIONS:
        wrap(name)


def attempt(run: Path, scenario: str) -> None:
    step, options = {"new": (30, {}), "again": (20, {"seed": 99}), "purge": (30, {"keep_last": 1})}[scenario]
    save(run, step, config=TIED, **options)


def examine(run: Path, scenario: str) -> None:
    """An older checkpoint or the new one is whole, as it was saved, and the run can save again."""
    skipped: list[str] = []
    whole = whole_checkpoints(run, skipped.append)
    assert whole, f"nothing is left: {sorted(os.listdir(run / 'checkpoints'))}"
    assert not skipped, f"something half-written has a checkpoint's name: {skipped}"
    steps = {load_state(path).step: path for path in whole}
    newest = max(steps)
    assert newest >= 20
    seeds = {20: (20, 99) if scenario == "again" else (20,), 10: (10,), 30: (30,)}
    for step, path in steps.items():
        assert any(same(weights(TIED, seed), load_state(path).model) for seed in seeds[step])
        assert same(moments(weights(TIED), step), load_state(path).optimizer)
    if newest == 20:
        assert 10 in steps, "nothing may be purged before the new one is there"
    final = save(run, 40, config=TIED, keep_last=2)
    assert whole_checkpoints(run)[0] == final
    assert sorted(os.listdir(run / "checkpoints")) == [steps_name(newest), "step-000040"]


def steps_name(step: int) -> str:
    return f"step-{step:06d}"


def main(folder: Path, scenario: str) -> None:
    torch.set_num_threads(1)
    template = folder / "template"
    save(template, 10, config=TIED)
    save(template, 20, config=TIED)
    for count in range(1, 10_000):
        run = folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        child = os.fork()
        if child == 0:
            die_at(count)
            attempt(run, scenario)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        try:
            examine(run, scenario)
        except AssertionError as error:
            raise SystemExit(f"death {count} of {scenario}: {error}") from error
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            print(count - 1)
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])


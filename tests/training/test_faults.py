"""Real processes, really killed: whatever happens, the run goes on and ends like the unbroken one."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny_run import tiny_values, write_recipe

pytestmark = pytest.mark.slow
STEPS = 40


def start(folder, *options):
    """`mm pretrain` in a process of its own, its output to a file."""
    log = (folder / "log.txt").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "mmcli", "pretrain", str(folder / "tiny.yaml"), *options]
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {(row["kind"], row["step"]): row["loss"] for row in rows if row["kind"] != "checkpoint"}


def steps_done(folder):
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count('"kind": "step"') if path.exists() else 0


def prepare(folder, shared):
    values = tiny_values(shared, steps=STEPS, validation_every=20)
    values["checkpoint"] |= {"folder": str(folder / "run"), "every": 5}
    write_recipe(folder, values)


def wait_for_step(process, folder, step):
    end = time.monotonic() + 120
    while steps_done(folder) < step and process.poll() is None:
        assert time.monotonic() < end, (folder / "log.txt").read_text()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    prepare(folder, folder)
    assert start(folder).wait(300) == 0, (folder / "log.txt").read_text()
    return folder


def same_end(folder, unbroken):
    assert losses(folder) == losses(unbroken)
    last = f"run/checkpoints/step-{STEPS:06d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        found, expected = load_file(folder / last / file), load_file(unbroken / last / file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_says_how_to_go_on_and_nothing_is_lost(unbroken, tmp_path, number, status):
    prepare(tmp_path, unbroken)
    process = start(tmp_path)
    wait_for_step(process, tmp_path, 13)
    process.send_signal(number)
    assert process.wait(60) == status
    log = (tmp_path / "log.txt").read_text()
    step = steps_done(tmp_path)
    assert f"stopped at step {step} of {STEPS}: saved" in log
    assert f"go on with: mm pretrain {tmp_path / 'tiny.yaml'} --resume" in log
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "manifest.json").exists()
    assert start(tmp_path, "--resume").wait(120) == 0
    same_end(tmp_path, unbroken)


def test_sigkill_at_random_moments(unbroken, tmp_path):
    """Killed six times, some before the first step or while a checkpoint is written; each session goes on."""
    prepare(tmp_path, unbroken)
    draw, killed, furthest = random.Random(4), 0, []
    for _ in range(20):
        process = start(tmp_path, "--resume")
        if killed < 6:
            wait_for_step(process, tmp_path, min(STEPS, steps_done(tmp_path) + 1))
            time.sleep(draw.uniform(0, 0.25))
        else:
            process.wait(120)
        if process.poll() is None:
            process.kill()
            killed += 1
        if process.wait(60) == 0:
            break
        furthest.append(steps_done(tmp_path))
    assert process.returncode == 0, (tmp_path / "log.txt").read_text()
    assert killed >= 3, furthest
    same_end(tmp_path, unbroken)
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {f"step-{STEPS - 5:06d}", f"step-{STEPS:06d}"} <= left
    # the one resumed from stays to the end of its session; half-written folders must be gone
    assert len(left) <= 3 and all(re.fullmatch(r"step-\d{6}", name) for name in left)

"""SIGKILL at every change of the disk while a checkpoint is saved (kill_driver.py says how)."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["new", "again", "purge"])
def test_killed_at_any_moment(tmp_path, scenario):
    memory = Path("/dev/shm")  # many syncs: a real disk takes three times as long and shows nothing more
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        check(folder, scenario)


def check(folder, scenario):
    command = [sys.executable, "-m", "tests.checkpoint.kill_driver", folder, scenario]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    # 8 files, each created and written at least once; a folder made and renamed; more where old ones go
    assert int(run.stdout) >= 18


@pytest.mark.slow
def test_one_of_two_ranks_killed_while_both_save(tmp_path):
    """Some of the moments (kill_ranks.py tries them all): every rename, and changes between them."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        command = [sys.executable, "-m", "tests.checkpoint.kill_ranks", folder, "--scenario", "purge", "--every", "60"]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = json.loads(run.stdout)["purge"]
    assert first >= 6 and second >= 1

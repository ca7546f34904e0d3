"""SIGKILL at every change of the disk while a checkpoint is saved (kill_driver.py says how)."""

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["new", "again", "purge"])
def test_killed_at_any_moment(tmp_path, scenario):
    command = [sys.executable, "-m", "tests.checkpoint.kill_driver", str(tmp_path), scenario]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    # 8 files of at least open, write, sync, close each; mkdir, sync, rename, sync around them
    assert int(run.stdout) > 36

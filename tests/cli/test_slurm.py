"""The SLURM script, run with stand-ins for srun, scontrol and mm."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm" / "pretrain.sbatch"

SRUN = """#!/bin/bash
# hands signals on to its task, as srun does
echo "srun $*" >> "$CALLS"
while [[ $1 == --* ]]; do shift; done
"$@" &
task=$!
trap 'kill -USR1 $task' USR1
trap 'kill -TERM $task' TERM
while true; do wait $task; status=$?; kill -0 $task 2>/dev/null || exit $status; done
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$CALLS"
[[ $1 == show ]] && printf 'node07\\nnode08\\n'
true
"""
MM = """#!/bin/bash
# trains until a signal, then needs a moment to save
echo "mm $*" >> "$CALLS"
[[ -n $MM_STATUS ]] && exit $MM_STATUS
trap 'sleep 0.3; echo saved >> "$CALLS"; exit 75' USR1 TERM
while true; do sleep 0.05; done
"""


@pytest.fixture
def start(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("mm", MM)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(status=""):
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "MM_STATUS": status,
            "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
        }  # fmt: skip
        command = ["bash", str(SCRIPT), "recipes/8b.yaml", "--set", "name=a b"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_training(tmp_path):
    end = time.monotonic() + 20
    while not any(line.startswith("mm ") for line in calls(tmp_path)):
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.3)  # its traps


def test_before_the_slot_ends_the_run_saves_and_is_requeued(start, tmp_path):
    job = start()
    wait_for_training(tmp_path)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0, job.stdout.read()
    said = calls(tmp_path)
    assert said[0] == "scontrol show hostnames node[07-08]"
    assert said[2] == "mm pretrain recipes/8b.yaml --set name=a b --resume --gpus 8 --nodes 2 --rdzv node07:21234"
    assert said[-2:] == ["saved", "scontrol requeue 41234"]


def test_a_cancelled_run_saves_and_is_not_requeued(start, tmp_path):
    job = start()
    wait_for_training(tmp_path)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert calls(tmp_path)[-1] == "saved"


@pytest.mark.parametrize(("status", "requeued"), [("0", False), ("1", False), ("2", False), ("75", True)])
def test_other_ends_keep_their_status(start, tmp_path, status, requeued):
    job = start(status)
    assert job.wait(20) == (0 if requeued else int(status))
    assert ("scontrol requeue 41234" in calls(tmp_path)) == requeued


def test_the_settings_agree_with_the_text():
    text = SCRIPT.read_text()
    assert "--signal=B:USR1@300" in text and "--requeue" in text and "--open-mode=append" in text
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)

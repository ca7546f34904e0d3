"""Runs of several ranks, saved by rows while they go on, stopped, and resumed on as many ranks or others."""

import json
import subprocess
import sys

import pytest
import torch

from mmcore.checkpoint.store import load_state
from tests.distributed.resume_driver import STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    command = [sys.executable, "-m", "tests.distributed.resume_driver", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, json.loads((folder / "results.json").read_text())


def drawn(ranks):
    """Step -> the samples of all ranks, in whatever order."""
    return {step: sorted(row for rank in ranks for row in rank["steps"][step]["rows"]) for step in ranks[0]["steps"]}


def last(folder, run):
    return folder / run / "checkpoints" / f"step-{STEPS:06d}"


def test_on_as_many_ranks_the_run_is_the_unbroken_one_to_the_last_bit(made):
    """Also where a SIGTERM reached one rank while a checkpoint was being written."""
    folder, results = made
    for rank in results["stopped"]:
        assert (rank["first"], rank["status"], rank["step"]) == (2, "interrupted", 5)
        assert rank["saved"].endswith("step-000005")
    assert all((rank["first"], rank["status"]) == (5, "done") for rank in results["resumed"])
    for before, *sessions in zip(results["unbroken"], results["stopped"], results["resumed"], strict=True):
        again = sessions[0]["steps"] | sessions[1]["steps"]
        assert again == {step: before["steps"][step] for step in ("3", "4", "5", "6")}
    files = sorted(path.name for path in last(folder, "unbroken").glob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert (last(folder, "stopped") / file).read_bytes() == (last(folder, "unbroken") / file).read_bytes(), file


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_on_other_ranks_the_samples_are_the_same_and_the_losses_close(made, ranks):
    """The checkpoint of step 4 is damaged, so all go on from step 2."""
    folder, results = made
    sessions = results[f"on {ranks}"]
    assert all((rank["first"], rank["status"]) == (2, "done") for rank in sessions)
    expected = drawn(results["unbroken"])
    assert drawn(sessions) == {step: expected[step] for step in ("3", "4", "5", "6")}
    for rank in sessions:
        for step, found in rank["steps"].items():
            assert found["loss"] == pytest.approx(results["unbroken"][0]["steps"][step]["loss"], rel=1e-4)
    end, before = (load_state(last(folder, run), verify=True) for run in (f"on-{ranks}", "unbroken"))
    assert end.state["sample_position"] == before.state["sample_position"] == 12 * STEPS
    for part in ("model", "optimizer"):
        for name, tensor in getattr(before, part).items():
            assert torch.allclose(getattr(end, part)[name], tensor, rtol=1e-3, atol=1e-4), name
    count = len(list(last(folder, f"on-{ranks}").glob("*.safetensors")))
    assert count == 2 * ranks


def test_every_sample_once(made):
    _, results = made
    rows = [row for rank in results["unbroken"] for step in rank["steps"].values() for row in step["rows"]]
    assert len(rows) == len(set(rows)) == 12 * STEPS

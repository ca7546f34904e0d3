"""Which processes a command line asks for, and how it becomes torchrun's agent."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmcli import app, launch
from mmcli.launch import Launch, Rank, read_launch
from mmcli.pretrain import Command, read_steps
from mmcore import processors
from mmcore.errors import ConfigError
from tests.helpers.tiny_run import tiny_values, write_recipe


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MM_STARTS_BEFORE", launch.GO_ON):
        monkeypatch.delenv(name, raising=False)


def test_what_is_asked_for():
    assert read_launch(None, None, None, None, None) is None
    assert read_launch("8", None, None, None, None) == Launch(8, on_cpu=False)
    assert read_launch("0", 4, None, None, 1) == Launch(4, on_cpu=True, max_restarts=1)
    assert read_launch("0", None, None, None, None) == Launch(1, on_cpu=True)
    many = read_launch("8", None, 64, "node01:29500", None)
    assert many == Launch(8, on_cpu=False, nodes=64, rdzv="node01:29500")
    for asked in (many, Launch(4, True, max_restarts=0), Launch(2, False, rdzv="h:1")):
        words = dict(zip(asked.words()[::2], asked.words()[1::2], strict=True))
        options = (words.get("--gpus"), words.get("--ranks"), words.get("--nodes"), words.get("--rdzv"), words.get("--max-restarts"))
        assert read_launch(*(int(o) if o and o.isdigit() and i else o for i, o in enumerate(options))) == asked


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("64xH100", None, None, None, None), "--gpus 64xH100: give the number of GPUs of a node to train on, or add --plan"),
        (("8", 2, None, None, None), "--ranks goes with --gpus 0"),
        ((None, 2, None, None, None), "add --gpus 0"),
        ((None, None, 2, "a:1", None), "add --gpus N"),
        ((None, None, None, None, 2), "add --gpus N"),
        (("8", None, 2, None, None), "add --rdzv HOST:PORT"),
        (("8", None, 2, "node01", None), "write it as HOST:PORT"),
        (("8", None, 2, "node01:99999", None), "--rdzv node01:99999: the port must lie between 1 and 65535"),
        (("8", None, 2, "node01:0", None), "the port must lie between 1 and 65535"),
        (("0", 0, None, None, None), "--ranks is 0: it must be at least 1"),
        (("8", None, None, None, -1), "--max-restarts is -1"),
        (("-1", None, None, None, None), "--gpus -1"),
    ],
)
def test_mistakes_are_named(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_launch(*options)


def test_inside_torchrun_the_options_contradict(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_launch(None, None, None, None, None) is None
    with pytest.raises(ConfigError, match="started by torchrun already"):
        read_launch("0", 2, None, None, None)


def test_the_command_becomes_the_agents(monkeypatch, tmp_path):
    path = write_recipe(tmp_path, tiny_values(tmp_path))
    called = []

    def execve(program, command, environment):
        called.append((program, command, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(processors, "granted", lambda *_: None)
    words = ["pretrain", str(path), "--set", "training.steps=3", "--gpus", "0", "--ranks", "5", "--overwrite", "--profile", "2"]
    assert app.run(words) == 0
    ((program, command, environment),) = called
    assert program == sys.executable and command[1:3] == ["-m", "mmcli.elastic"]
    assert Launch(**json.loads(command[3])) == Launch(5, on_cpu=True)
    assert command[4:] == [
        "pretrain", str(path), "--set", "training.steps=3", "--overwrite", "--profile", "2:2",
        "--set", "training.device=cpu",
    ]  # fmt: skip
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment[launch.GO_ON] == f"mm pretrain {path} --set training.steps=3 --gpus 0 --ranks 5 --resume"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert app.run(["pretrain", str(path), "--gpus", "3", "--resume"]) == 0
    assert called[1][2]["OMP_NUM_THREADS"] == "7" and called[1][1][-1] == "training.device=cuda"


def test_a_mistake_in_the_recipe_starts_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started"))
    path = write_recipe(tmp_path, tiny_values(tmp_path))
    assert app.run(["pretrain", str(path), "--gpus", "2", "--set", "training.stepz=1"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--plan", "--gpus", "8"], "--plan --gpus 8: say which GPUs, such as 8xH100"),
        (["--plan", "--nodes", "8"], "--nodes does not go with --plan"),
        (["--profile", "0"], "--profile 0: give a step"),
        (["--profile", "5:4"], "--profile 5:4"),
        (["--profile", "a"], "--profile a"),
    ],
)
def test_options_that_do_not_fit(words, sentence, tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_values(tmp_path))
    assert app.run(["pretrain", str(path), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_steps_to_profile():
    assert (read_steps(None), read_steps("10"), read_steps("10:13")) == (None, (10, 10), (10, 13))


def test_a_rank_knows_itself_and_how_its_run_goes_on(monkeypatch, tmp_path):
    assert Rank.here() == Rank() and not Rank.here().launched
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("TORCHELASTIC_RESTART_COUNT", "2"), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, value)
    assert Rank.here() == Rank(3, 8, 2) and Rank.here().launched
    monkeypatch.setenv("MM_STARTS_BEFORE", "4")  # this node's launcher has counted fewer than another one's
    assert Rank.here().restarts == 4
    command = Command("pretrain", tmp_path / "a.yaml", [], False, False, None)
    assert command.to_go_on() == f"torchrun ... -m mmcli pretrain {tmp_path / 'a.yaml'} --resume"
    monkeypatch.setenv(launch.GO_ON, "mm pretrain a.yaml --gpus 8 --resume")
    assert command.to_go_on() == "mm pretrain a.yaml --gpus 8 --resume"


def test_ranks_started_again_do_not_overwrite_what_they_wrote(tmp_path, monkeypatch):
    assert not launch.begun_since_launch(tmp_path)
    for started, since in (("2020-01-01T00:00:00+0000", False), (time.strftime("%Y-%m-%dT%H:%M:%S%z"), True)):
        (tmp_path / "environment.json").write_text(json.dumps({"started": started}))
        assert launch.begun_since_launch(tmp_path) == since
    (tmp_path / "environment.json").write_text("{")
    assert not launch.begun_since_launch(tmp_path)


def test_failures_are_left_for_the_launcher(monkeypatch, tmp_path):
    launch.report_failure("nobody listens")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    launch.report_failure("the disk is full")
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "the disk is full"


def test_a_rank_killed_while_it_leaves_its_failure_leaves_none(monkeypatch, tmp_path):
    """torchrun's agent, which reads the file, would fail on half of it, and the job with it."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def killed(path, text, **_):
        with path.open("w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        launch.report_failure("the disk is full")
    assert not (tmp_path / "error.json").exists()


def test_launching_imports_no_torch():
    code = "import sys, mmcli.pretrain, mmcli.finetune, mmcli.launch; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_full_disk_is_no_failure_to_start_again_from(tmp_path):
    with (tmp_path / "log").open("w") as log:
        with pytest.raises(OSError, match="No space"), launch.failures_to(log, Rank()):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert log.tell() == 0

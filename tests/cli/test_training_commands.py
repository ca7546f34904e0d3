"""`mm pretrain` and `mm finetune` from the outside: output, exit status, messages."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from mmcli import app
from mmcli.pretrain import Command
from mmcore.config import checks
from mmcore.kernels import dispatch
from mmcore.kernels.linear import cpu as linear_cpu
from mmcore.training import setup
from tests.helpers.tiny_run import tiny_values, write_recipe


@pytest.fixture
def path(tmp_path):
    return write_recipe(tmp_path, tiny_values(tmp_path, steps=2))


def test_pretrain_then_finetune(path, tmp_path, capsys):
    assert app.run(["pretrain", str(path)]) == 0
    shown = capsys.readouterr().out
    for part in ("loading torch", "making a tokenizer", "parameters on cpu in fp32", "step 2/2", "validation loss", "saved"):
        assert part in shown
    assert f"next: mm eval {tmp_path / 'run'} --data FILE, or mm chat {tmp_path / 'run'}" in shown
    tune = ["finetune", str(path), "--set", f"training.init_from={tmp_path / 'run'}", "--set", f"checkpoint.folder={tmp_path / 't'}"]
    assert app.run(tune) == 0
    trainer = json.loads((tmp_path / "t/checkpoints/step-000002/trainer.json").read_text())
    assert (trainer["stage"], trainer["step"]) == ("finetune", 2)
    capsys.readouterr()
    assert app.run(["pretrain", str(path), "--plan", "--json", *tune[2:]]) == 0
    plan = json.loads(capsys.readouterr().out)
    values = tiny_values(tmp_path, init_from=str(tmp_path / "run"))
    del values["model"]  # it is the checkpoint's
    chat = str(write_recipe(tmp_path / "t", values))
    assert app.run(["pretrain", chat, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == plan["parameters"]
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    longer = ["--set", "model.max_position_embeddings=128"]
    for source, told in (("nowhere", "there is no nowhere: name a checkpoint"), (tmp_path / "begun", "has no whole checkpoint")):
        start = ["--plan", "--set", f"training.init_from={source}"]
        assert told in complaint(capsys, "pretrain", chat, *start)
        assert told in complaint(capsys, "pretrain", chat, *start, *longer), "the context alone is no model"
        assert app.run(["pretrain", str(path), "--json", *start]) == 0, "it says itself what model that is"
        capsys.readouterr()


def test_a_cpu_without_compiled_kernels_is_told_so(path, tmp_path, monkeypatch, capfd):
    """And all commands do their work."""
    monkeypatch.setattr(dispatch, "_NO_COMPILER", "there is no C compiler")
    monkeypatch.setattr(dispatch, "_FORCED", "auto")
    monkeypatch.setattr(linear_cpu, "_multiplies_bf16", lambda: False)  # which is remembered
    run, said = str(tmp_path / "run"), "slower: there is no C compiler"
    for words in (["pretrain", str(path)], ["eval", run, "--data", str(tmp_path / "text.txt"), "--max-tokens", "100",
                   "--device", "cpu"],
                  ["chat", run, "--prompt", "a", "--max-new-tokens", "2", "--device", "cpu"]):  # fmt: skip
        assert app.run(words) == 0
        shown = capfd.readouterr()
        assert said in shown.err or said in " ".join(shown.out.split()), words[0]


def complaint(capsys, *words):
    assert app.run([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("mm: ")
    return captured.err


LLAMA = "model.model_type=llama"
MODELS_THAT_CANNOT_BE = [
    ((LLAMA, "model.rope_scaling={rope_type: yarn, factor: 4}"), "rope_scaling has rope_type 'yarn', and only linear and llama3"),
    ((LLAMA, "model.rope_scaling={factor: 4}"), "model.rope_scaling has factor and no rope_type that uses it: choose linear or llama3"),
    ((LLAMA, "model.rope_scaling={rope_type: linear}"), "model.rope_scaling.factor is None and must be a positive number"),
    ((LLAMA, "model.rope_theta=0"), "model.rope_theta is 0.0: it must be positive and finite"),
    (("model.rope_theta=500000",), "model.rope_theta is given for a memory_mosaics_v2, which has no use for it: remove it"),
    (("model.num_key_value_heads=2",), "model.num_key_value_heads is given for a memory_mosaics_v2"),
    (("model.max_position_embeddings=100000000000000000000",), "it must be at least 1 and below 2**31"),
]
"""What config.json could not say, or what would have no effect, is told before the first step."""


def test_mistakes_of_the_command_line(path, capsys):
    assert "--json goes with --plan" in complaint(capsys, "pretrain", path, "--json")
    assert "keep one" in complaint(capsys, "pretrain", path, "--resume", "--overwrite")
    for changes, told in MODELS_THAT_CANNOT_BE:
        assert told in complaint(capsys, "pretrain", path, *(f"--set={change}" for change in changes))
    assert "unknown key training.stepz: did you mean steps?" in complaint(capsys, "pretrain", path, "--set", "training.stepz=3")
    assert "mm finetune" in complaint(capsys, "pretrain", path, "--set", "training.init_from=x")
    assert "no training.init_from" in complaint(capsys, "finetune", path)


def test_a_used_folder(path, capsys):
    assert app.run(["pretrain", str(path)]) == 0
    capsys.readouterr()
    assert "go on with --resume, start over with --overwrite" in complaint(capsys, "pretrain", path)
    assert "weight_decay was 0.1 and is now 0.5" in complaint(
        capsys, "pretrain", path, "--resume", "--set", "training.weight_decay=0.5"
    )
    changes = ["--set", "training.steps=3", "--set", "training.learning_rate=0.5"]
    assert app.run(["pretrain", str(path), "--resume", *changes]) == 0
    shown = capsys.readouterr().out
    assert "from step 2 on" in shown and "learning_rate was 0.003 and is now 0.5" in " ".join(shown.split())


def test_a_run_goes_on_with_what_has_no_effect(path, tmp_path, capsys, monkeypatch):
    """Recipes of before may hold it, and must stay as they were."""
    with monkeypatch.context() as before:
        before.setattr(checks, "_without_effect", lambda model: [])
        change = ["--set", "model.rope_theta=500000", "--set", "model.rope_scaling={rope_type: yarn}"]
        assert app.run(["pretrain", str(path), *change, "--set", "training.schedule=constant"]) == 0
    more = ["--set", "training.schedule=constant", "--set", "training.steps=3"]
    assert app.run(["pretrain", str(path), *change, *more, "--resume"]) == 0
    assert "which has no use for it" in complaint(capsys, "pretrain", path, *change, "--overwrite")


def test_a_plan_needs_no_data(path, tmp_path, capsys):
    (tmp_path / "text.txt").unlink()
    assert app.run(["pretrain", str(path), "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] > 0


def test_the_command_to_go_on_keeps_the_overrides():
    command = Command("pretrain", Path("my recipe.yaml"), ["training.steps=5", "name=a b"], False, True, None)
    assert command.to_go_on() == "mm pretrain 'my recipe.yaml' --set training.steps=5 --set 'name=a b' --resume"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_while_data_are_prepared_is_a_sentence_and_a_schedulers_status(path, tmp_path, monkeypatch, capsys, number):
    def prepare(*_, **__):
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(setup, "prepare", prepare)
    assert app.run(["pretrain", str(path)]) == 75
    said = f"mm: {number.name} before the first step: nothing was trained, run the same command again\n"
    assert capsys.readouterr().err == said and signal.getsignal(number) is before
    monkeypatch.undo()
    assert app.run(["pretrain", str(path)]) == 0


def test_only_pretraining_speaks_of_plans(capsys):
    for command, plans in (("pretrain", True), ("finetune", False)):
        assert app.run([command, "--help"]) == 0
        (gpus,) = re.findall(r"--gpus N(.*?)--ranks", capsys.readouterr().out, re.DOTALL)
        assert ("64xH100" in gpus) == plans

"""Saving while a run goes on: what the recipe's checkpoint section asks for is what happens."""

import json
import os
import threading

import pytest
import torch

from mmcore.checkpoint.store import load_state, whole_checkpoints
from mmcore.config import build_recipe
from mmcore.errors import CheckpointError, ConfigError
from mmcore.training import events
from mmcore.training.setup import Start, prepare_trainer
from tests.helpers.tiny_run import tiny_values


def recipe(folder, steps=6, **checkpoint):
    values = tiny_values(folder, steps=steps, validation_every=0)
    values["checkpoint"] |= checkpoint
    return build_recipe(values)


def names(folder):
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_steps_are_made_while_a_checkpoint_is_written_and_the_weights_are_those_of_its_step(tmp_path, monkeypatch):
    """The disk stands still from step 2 to step 4; the next save waits for it."""
    heard, opened, weights, real = [], threading.Event(), {}, os.write

    def write(descriptor, data):
        if threading.current_thread().name == "checkpoint":
            assert opened.wait(60)
        return real(descriptor, data)

    def listen(event):
        heard.append(event)
        if isinstance(event, events.StepDone):
            weights[event.step] = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            if event.step == 4:
                opened.set()

    trainer = prepare_trainer(recipe(tmp_path, keep_last=0), listeners=[listen])
    monkeypatch.setattr(os, "write", write)
    assert trainer.fit().status == "done"
    order = [(type(event).__name__, event.step) for event in heard if isinstance(event, (events.StepDone, events.Saving,
                                                                                         events.Saved))]  # fmt: skip
    assert order[:7] == [("StepDone", 1), ("StepDone", 2), ("Saving", 2), ("StepDone", 3), ("StepDone", 4), ("Saved", 2),
                         ("Saving", 4)]  # fmt: skip
    saved = {event.step: event for event in heard if isinstance(event, events.Saved)}
    assert list(saved) == [2, 4, 6] and saved[2].stalled_seconds < saved[2].seconds
    assert saved[6].stalled_seconds == saved[6].seconds, "the last one is waited for"
    for step, event in saved.items():
        stored = load_state(event.path, verify=True).model
        assert all(torch.equal(stored[name], tensor) for name, tensor in weights[step].items())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "checkpoint"]
    assert [(row["step"], row["path"]) for row in rows] == [(2, "step-000002"), (4, "step-000004"), (6, "step-000006")]
    assert rows[0]["stalled_seconds"] == saved[2].stalled_seconds


def test_a_disk_that_fills_behind_the_training_ends_it_and_the_checkpoint_before_is_whole(tmp_path, monkeypatch):
    real = os.write

    def full(descriptor, data):
        if threading.current_thread().name == "checkpoint":
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    def listen(event):
        if isinstance(event, events.Saved):
            monkeypatch.setattr(os, "write", full)

    trainer = prepare_trainer(recipe(tmp_path, steps=20), listeners=[listen])
    with pytest.raises(CheckpointError, match="step-0000.*the disk is full: free some space"):
        trainer.fit()
    assert trainer.step < 10, "training must not go on for long without checkpoints"
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000002"] and len(whole_checkpoints(tmp_path / "run")) == 1
    again = prepare_trainer(recipe(tmp_path, steps=20), start=Start(resume=True))
    assert again.step == 2 and again.fit().status == "done"


def test_a_model_only_final(tmp_path):
    small = recipe(tmp_path, final="model", keep_last=2)
    assert prepare_trainer(small).fit().status == "done"
    last, before = (load_state(path) for path in whole_checkpoints(tmp_path / "run"))
    assert (last.step, len(last.optimizer)) == (6, 0) and (before.step, len(before.optimizer) > 0) == (4, True)
    assert prepare_trainer(small, start=Start(resume=True)).fit().status == "done"
    with pytest.raises(CheckpointError, match="step-000006 holds the model alone .*or remove it to go on from step-000004"):
        prepare_trainer(recipe(tmp_path, steps=8, final="model"), start=Start(resume=True))
    (before.path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="step-000006 holds the model alone .*mm finetune` and training.init_from$"):
        prepare_trainer(recipe(tmp_path, steps=8, final="model"), start=Start(resume=True))


def test_some_checkpoints_stay(tmp_path):
    assert prepare_trainer(recipe(tmp_path, steps=9, keep_last=1, keep_every=4)).fit().status == "done"
    assert names(tmp_path) == ["step-000004", "step-000008", "step-000009"]


@pytest.mark.parametrize(
    "keys, words",
    [({"keep_every": 3}, "keep_every 3 is no multiple of checkpoint.every 2"), ({"keep_every": -2}, "at least 0"),
     ({"final": "best"}, "checkpoint.final is 'best': choose full or model"), ({"asynchronous": "later"}, "asynchronous")],
)  # fmt: skip
def test_what_cannot_be_asked_for(tmp_path, keys, words):
    with pytest.raises(ConfigError, match=words):
        recipe(tmp_path, **keys)

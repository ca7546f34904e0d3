"""Steps that go wrong: skipped without an update, or undone by going back, and remembered either way."""

import dataclasses
import json
import math

import pytest
import torch

from mmcore.config import SpikeConfig, build_recipe
from mmcore.data.loader import make_batch
from mmcore.errors import ConfigError, NonFiniteError, SpikeError
from mmcore.training import events
from mmcore.training.faults import Faults, SpikeWatch
from mmcore.training.setup import Start, prepare_trainer
from tests.helpers.tiny_run import tiny_values
from tests.training.test_trainer import lines, weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


def recipe(folder, shared, **training):
    values = tiny_values(shared, validation_every=0, **training)
    values["checkpoint"] |= {"folder": str(folder / "run"), "every": 2}
    return build_recipe(values)


def poisoned(recipe, steps, heard, start=None, value=math.nan):
    """A trainer whose first micro-batch in these steps has a loss of `value`, or `value` times as large."""
    trainer = prepare_trainer(recipe, start=start, listeners=[heard.append])
    accumulated, plain = [], trainer.model.loss

    def loss(tokens, *rest, **settings):
        if trainer.model.training:
            accumulated.append(trainer.step + 1)
        found = plain(tokens, *rest, **settings)
        first = accumulated.count(trainer.step + 1) == 1
        return found * value if trainer.model.training and trainer.step + 1 in steps and first else found

    trainer.model.loss = loss
    return trainer


def of(kind, heard):
    return [event for event in heard if isinstance(event, kind)]


def test_skipped_steps_change_no_weight_and_the_samples_go_on(shared, tmp_path):
    heard, seen = [], {}
    trainer = poisoned(recipe(tmp_path, shared, on_nonfinite="skip"), {3, 4, 7}, heard)

    def remember(event):
        if isinstance(event, (events.StepDone, events.Skipped)):
            seen[event.step] = (weights(trainer), trainer.position)

    trainer.listeners.append(remember)
    assert trainer.fit().status == "done"
    for step in (3, 4, 7):
        assert all(torch.equal(seen[step][0][name], tensor) for name, tensor in seen[step - 1][0].items())
    assert not torch.equal(seen[5][0]["lm_head.weight"], seen[4][0]["lm_head.weight"])
    assert [position for _, position in seen.values()] == [4 * step for step in range(1, 9)]
    skipped = of(events.Skipped, heard)
    assert [(e.step, e.samples, e.in_a_row, e.total) for e in skipped] == [(3, (8, 12), 1, 1), (4, (12, 16), 2, 2), (7, (24, 28), 1, 3)]
    assert "the loss is nan on samples 8-9" == skipped[0].reason
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in rows if row["kind"] in ("step", "skipped")] == [
        ("step", 1), ("step", 2), ("skipped", 3), ("skipped", 4), ("step", 5), ("step", 6), ("skipped", 7), ("step", 8)
    ]  # fmt: skip
    state = json.loads((tmp_path / "run/checkpoints/step-000008/trainer.json").read_text())
    assert state["faults"]["left_out"] == [[8, 12], [12, 16], [24, 28]] and state["optimizer_steps"] == {"*": 5}


def test_a_resumed_run_skips_the_same_and_ends_the_same(shared, tmp_path):
    one, two = recipe(tmp_path / "one", shared, on_nonfinite="skip"), recipe(tmp_path / "two", shared, on_nonfinite="skip")
    unbroken = poisoned(one, {3, 4, 5}, [])
    unbroken.fit()

    def crash(event):
        if isinstance(event, events.Skipped) and event.step == 5:
            raise RuntimeError("pulled the plug")

    broken = poisoned(two, {3, 4, 5}, [])
    broken.listeners.append(crash)
    with pytest.raises(RuntimeError, match="plug"):
        broken.fit()
    heard = []
    resumed = poisoned(two, {3, 4, 5}, heard, Start(resume=True))
    resumed.fit()
    assert of(events.Skipped, heard)[-1].in_a_row == 3  # two of them before the break, at the checkpoint of step 4
    assert resumed.faults.state() == unbroken.faults.state()
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(unbroken).items())


def test_a_run_whose_first_steps_are_all_skipped_can_be_resumed(shared, tmp_path):
    """Its checkpoint has no moments, as one of the model alone has none; here there were none to leave out."""
    one, two = (recipe(tmp_path / name, shared, on_nonfinite="skip", steps=4) for name in ("one", "two"))
    unbroken = poisoned(one, {1, 2}, [])
    unbroken.fit()

    def crash(event):
        if isinstance(event, events.StepDone):
            raise RuntimeError("pulled the plug")

    broken = poisoned(two, {1, 2}, [])
    broken.listeners.append(crash)
    with pytest.raises(RuntimeError, match="plug"):
        broken.fit()
    resumed = poisoned(two, set(), [], Start(resume=True))
    assert resumed.step == 2
    resumed.fit()
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(unbroken).items())


def test_too_many_in_a_row_stop_the_run(shared, tmp_path):
    trainer = poisoned(recipe(tmp_path, shared, on_nonfinite="skip", max_skipped_steps=3), {2, 3, 4, 5}, [])
    with pytest.raises(NonFiniteError, match="step 4 stopped before its update: the loss is nan .*, 3 such steps in a row"):
        trainer.fit()
    assert trainer.step == 3


def spike_recipe(folder, shared, **spikes):
    return recipe(folder, shared, steps=10, spike_rollback={"nats": 1.0, "after_steps": 2} | spikes)


def test_a_spike_goes_back_and_leaves_the_samples_out(shared, tmp_path):
    """Steps 1 to 4, a spike in step 6: back to 4, whose next samples are those after the spike's."""
    heard, read = [], []
    trainer = poisoned(spike_recipe(tmp_path, shared), {6}, heard, value=3.0)
    spiky = trainer.model.loss

    def once(*rest, **settings):  # step 6 comes again after the roll-back, with other samples: then it is no spike
        after = trainer.faults.counts.rollbacks
        return type(trainer.model).loss(trainer.model, *rest, **settings) if after else spiky(*rest, **settings)

    trainer.model.loss = once
    trainer.listeners.append(lambda event: read.append((event.step, trainer.position)) if isinstance(event, events.StepDone) else None)
    assert trainer.fit().status == "done"
    (back,) = of(events.RolledBack, heard)
    assert (back.step, back.spike_step, back.samples, back.count) == (4, 6, (16, 24), 1)
    assert back.loss > back.smoothed_loss + 1
    assert read == [(1, 4), (2, 8), (3, 12), (4, 16), (5, 20), (5, 28), (6, 32), (7, 36), (8, 40), (9, 44), (10, 48)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "rollback"] == [4]

    expected = by_hand(spike_recipe(tmp_path / "hand", shared), leave_out={4: 8})
    assert all(torch.equal(weights(trainer)[name], tensor) for name, tensor in expected.items())


def by_hand(recipe, leave_out):
    """The weights of a run that jumps over so many samples after the given steps."""
    trainer = prepare_trainer(dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, spike_rollback=None)))
    samples, training = trainer.job.samples, recipe.training

    def batches():
        while True:
            trainer.position += leave_out.pop(trainer.step, 0)
            at = trainer.position
            yield [make_batch(samples, range(at, at + 2)), make_batch(samples, range(at + 2, at + 4))]

    trainer._peak = 1.0
    trainer.model.train()
    steps = batches()
    for _ in range(training.steps):
        trainer._train_step(steps)
    return weights(trainer)


def test_the_checkpoint_gone_back_to_knows_of_it(shared, tmp_path):
    """Killed right after the roll-back: whoever resumes leaves out the same samples."""
    same, heard = spike_recipe(tmp_path, shared), []
    trainer = poisoned(same, {6}, heard, value=3.0)

    def crash(event):
        if isinstance(event, events.RolledBack):
            raise RuntimeError("pulled the plug")

    trainer.listeners.append(crash)
    with pytest.raises(RuntimeError, match="plug"):
        trainer.fit()
    resumed = prepare_trainer(same, start=Start(resume=True))
    assert (resumed.step, resumed.position, resumed.faults.left_out) == (4, 24, [(16, 24)])
    assert resumed.fit().status == "done" and resumed.position == 48


def test_spikes_without_end_stop_the_run_and_without_a_checkpoint_are_said(shared, tmp_path):
    trainer = poisoned(spike_recipe(tmp_path, shared, max_rollbacks=2), {5}, [], value=3.0)
    plain = trainer.model.loss
    trainer.model.loss = lambda *a, **k: plain(*a, **k) * (3.0 if trainer.step == 4 else 1.0)
    with pytest.raises(SpikeError, match="step 5 .* after 2 roll-backs.*max_rollbacks"):
        trainer.fit()
    heard, values = [], spike_recipe(tmp_path / "none", shared, after_steps=1)
    values = dataclasses.replace(values, checkpoint=dataclasses.replace(values.checkpoint, every=9))
    trainer = poisoned(values, {4}, heard, value=3.0)
    assert trainer.fit().status == "done"
    assert any("no checkpoint yet" in event.text for event in of(events.Notice, heard))


def test_what_counts_as_a_spike():
    watch = SpikeWatch(SpikeConfig(deviations=4, after_steps=3))
    for loss in (5.0, 4.0, 5.0):
        assert not watch.is_spike(50.0)
        watch.take_in(loss)
    mean = (5 * 0.95**2 + 4 * 0.95 + 5) / (0.95**2 + 0.95 + 1)
    squares = [(4 - 5) ** 2, (5 - (5 * 0.95 + 4) / 1.95) ** 2]
    deviation = math.sqrt((squares[0] * 0.95 + squares[1]) / 1.95)
    assert watch.threshold() == pytest.approx(4 * deviation)
    assert watch.is_spike(mean + 4.01 * deviation) and not watch.is_spike(mean + 3.99 * deviation)
    again = SpikeWatch(watch.config)
    again.load(json.loads(json.dumps(watch.state())))
    assert again.threshold() == watch.threshold() and again.seen == 3
    still = SpikeWatch(SpikeConfig(deviations=4, after_steps=1))
    for _ in range(5):
        still.take_in(2.0)
    assert not still.is_spike(2.03) and still.is_spike(2.05)


@pytest.mark.parametrize("spikes", [{}, {"nats": 1, "deviations": 2}, {"nats": -1.0}, {"nats": 1.0, "max_rollbacks": 0}])
def test_settings_of_spikes_are_checked(spikes, tmp_path):
    values = tiny_values(tmp_path)
    values["training"]["spike_rollback"] = spikes
    with pytest.raises(ConfigError, match="spike_rollback"):
        build_recipe(values)


def test_faults_survive_json():
    from mmcore.config import TrainingConfig
    from mmcore.distributed.mesh import World

    faults = Faults(TrainingConfig(on_nonfinite="skip"), World())
    faults.skip(3, "why", range(8, 12), None, 1e-3)
    faults.went_back(range(20, 28))
    again = Faults(TrainingConfig(), World())
    again.load(json.loads(json.dumps(faults.state())))
    assert again.state() == faults.state() and again.left_out == [(8, 12), (20, 28)]

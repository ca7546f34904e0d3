"""The trainer: exact resumption, stops that lose nothing, what a run leaves behind."""

import json
import math
import os
import signal
import threading

import pytest
import torch

from mmcore.config import build_recipe
from mmcore.errors import CheckpointError, ConfigError, DataError, HardwareError, NonFiniteError
from mmcore.kernels.linear import cpu
from mmcore.kernels.linear.cpu import multiplies_bf16
from mmcore.training import checks, events, setup
from mmcore.training.memory import explain_memory
from mmcore.training.setup import Start, prepare_trainer
from tests.helpers.tiny_run import tiny_recipe, tiny_values, write_text


def lines(folder, kind="step"):
    """The metrics of a kind, without what the clock and the machine decide."""
    clock = {"tokens_per_second", "mfu", "memory_bytes", "elapsed_seconds", "seconds_left", "seconds"}
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in clock} for row in rows if row["kind"] == kind]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def steps_in(folder):
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Eight steps without a break, and the folder whose data the other runs share."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainer = prepare_trainer(tiny_recipe(folder))
    outcome = trainer.fit()
    return folder, trainer, outcome


class StopAfter:
    """A listener that sends a signal to this process once a step is done, and waits until it was heard."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number
        self.heard = threading.Event()

    def __call__(self, event):
        if isinstance(event, events.Stopping):
            self.heard.set()
        if isinstance(event, events.StepDone) and event.step == self.step:
            os.kill(os.getpid(), self.number)
            assert self.heard.wait(10)


def recipe(folder, unbroken, **training):
    """The unbroken run's recipe, its text and shards, with a run folder of its own."""
    values = tiny_values(unbroken[0], **training)
    values["checkpoint"]["folder"] = str(folder / "run")
    return build_recipe(values)


def test_loss_falls_and_everything_is_written(unbroken):
    folder, _, outcome = unbroken
    assert (outcome.status, outcome.step, outcome.checkpoint.name) == ("done", 8, "step-000008")
    steps = lines(folder)
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert abs(steps[0]["loss"] - math.log(384)) < 0.5  # untrained: near the uniform distribution
    assert [row["step"] for row in lines(folder, "validation")] == [3, 6, 8]
    assert steps_in(folder) == ["step-000006", "step-000008"]
    written = {path.name for path in (folder / "run").iterdir()}
    assert written == {
        ".lock", "recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "tensorboard", "tokenizer", "checkpoints"
    }  # fmt: skip
    checkpoint = {path.name for path in outcome.checkpoint.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.model", "recipe.yaml", "trainer.json"} <= checkpoint
    assert "chat_template.jinja" not in checkpoint


def test_the_checkpoint_loads_as_a_model_and_equals_the_trained_one(unbroken):
    from mmcore.checkpoint.load import load_model

    folder, trainer, _ = unbroken
    loaded = dict(load_model(folder / "run").named_parameters())
    for name, tensor in weights(trainer).items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("step", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 7))])
@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_stopped_and_resumed_is_the_unbroken_run_to_the_last_bit(unbroken, tmp_path, step, number):
    same = recipe(tmp_path, unbroken)
    outcome = prepare_trainer(same, listeners=[StopAfter(step, number)]).fit()
    assert (outcome.status, outcome.step, outcome.signal) == ("interrupted", step, number)
    assert outcome.checkpoint.name == f"step-{step:06d}"
    trainer = prepare_trainer(same, start=Start(resume=True))
    assert trainer.fit().status == "done"
    assert lines(tmp_path) == lines(unbroken[0])
    assert lines(tmp_path, "validation") == lines(unbroken[0], "validation")
    for name, tensor in weights(unbroken[1]).items():
        assert torch.equal(weights(trainer)[name], tensor), name


def test_a_crash_goes_back_to_the_newest_checkpoint_and_drops_later_lines(unbroken, tmp_path):
    same = recipe(tmp_path, unbroken)

    def crash(event):
        if isinstance(event, events.StepDone) and event.step == 5:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        prepare_trainer(same, listeners=[crash]).fit()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]
    trainer = prepare_trainer(same, start=Start(resume=True))
    assert trainer.step == 4 and [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 4]
    trainer.fit()
    assert lines(tmp_path) == lines(unbroken[0])


def test_damaged_checkpoints_are_passed_over_with_the_reason(unbroken, tmp_path):
    same, heard = recipe(tmp_path, unbroken, steps=8), []
    prepare_trainer(same).fit()
    damaged = tmp_path / "run" / "checkpoints" / "step-000008" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    trainer = prepare_trainer(same, start=Start(resume=True), listeners=[heard.append])
    assert trainer.step == 6
    (notice,) = [event.text for event in heard if isinstance(event, events.Notice)]
    assert "step-000008" in notice and "model.safetensors" in notice
    trainer.fit()
    assert lines(tmp_path) == lines(unbroken[0])


def test_no_whole_checkpoint_left_is_an_error_not_a_fresh_start(unbroken, tmp_path):
    same = recipe(tmp_path, unbroken)
    prepare_trainer(same).fit()
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of .* is whole .*: start over with --overwrite"):
        prepare_trainer(same, start=Start(resume=True))


def test_resume_without_a_checkpoint_begins_and_says_so(unbroken, tmp_path):
    heard = []
    trainer = prepare_trainer(recipe(tmp_path, unbroken), start=Start(resume=True), listeners=[heard.append])
    assert trainer.step == 0
    assert any(isinstance(event, events.Notice) and "no checkpoint yet" in event.text for event in heard)


def test_resuming_a_finished_run_does_nothing(unbroken, tmp_path):
    same, heard = recipe(tmp_path, unbroken), []
    prepare_trainer(same).fit()
    before = lines(tmp_path)
    outcome = prepare_trainer(same, start=Start(resume=True), listeners=[heard.append]).fit()
    assert outcome.status == "done" and lines(tmp_path) == before
    assert not any(isinstance(event, events.StepDone) for event in heard)


def test_a_longer_run_goes_on_from_a_finished_one(unbroken, tmp_path):
    prepare_trainer(recipe(tmp_path, unbroken)).fit()
    heard = []
    longer = recipe(tmp_path, unbroken, steps=10)
    trainer = prepare_trainer(longer, start=Start(resume=True), listeners=[heard.append])
    assert trainer.fit().step == 10
    assert any(isinstance(event, events.Notice) and "cosine" in event.text for event in heard)


def test_another_recipe_is_refused(unbroken, tmp_path):
    prepare_trainer(recipe(tmp_path, unbroken, steps=2)).fit()
    with pytest.raises(CheckpointError, match="training.weight_decay was 0.1 and is now 0.2"):
        prepare_trainer(recipe(tmp_path, unbroken, steps=2, weight_decay=0.2), start=Start(resume=True))


def test_a_used_folder_is_refused_and_overwritten_when_asked(unbroken, tmp_path):
    same = recipe(tmp_path, unbroken, steps=2)
    prepare_trainer(same).fit()
    with pytest.raises(ConfigError, match="already holds checkpoints"):
        prepare_trainer(same)
    assert prepare_trainer(recipe(tmp_path, unbroken, steps=1), start=Start(overwrite=True)).fit().step == 1
    assert steps_in(tmp_path) == ["step-000001"] and len(lines(tmp_path)) == 1


def test_changed_data_are_refused_on_resume(tmp_path):
    same = tiny_recipe(tmp_path, steps=2)
    prepare_trainer(same).fit()
    write_text(tmp_path / "text.txt", seed=5)
    with pytest.raises((DataError, CheckpointError), match="data changed|tokenizer"):
        prepare_trainer(same, start=Start(resume=True))


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_the_update(unbroken, tmp_path, what):
    trainer = prepare_trainer(recipe(tmp_path, unbroken))
    before = {}

    def poison(event):
        if isinstance(event, events.StepDone) and event.step == 4:
            before.update(weights(trainer))
            weight = trainer.model.lm_head.weight
            if what == "loss":
                trainer.model.loss = lambda *a, **k: (weight * math.nan).sum()
            else:
                weight.register_hook(lambda grad: grad * math.inf)

    trainer.listeners.append(poison)
    with pytest.raises(NonFiniteError, match=rf"step 5 .*{what}.* samples 16-1[79].*step-000004"):
        trainer.fit()
    assert trainer.step == 4 and steps_in(tmp_path) == ["step-000002", "step-000004"]
    for name, tensor in before.items():
        assert torch.equal(weights(trainer)[name], tensor), name
    assert prepare_trainer(recipe(tmp_path, unbroken), start=Start(resume=True)).fit().status == "done"
    assert lines(tmp_path) == lines(unbroken[0])


def test_micro_batches_change_nothing_but_rounding(unbroken, tmp_path):
    prepare_trainer(recipe(tmp_path, unbroken, micro_batch_size=3)).fit()
    for row, expected in zip(lines(tmp_path), lines(unbroken[0]), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["trained_tokens"] == expected["trained_tokens"]


def test_a_step_without_a_label_has_no_loss(unbroken, tmp_path):
    trainer = prepare_trainer(recipe(tmp_path, unbroken, steps=2))
    whole = trainer.job.samples

    class Silent:
        """The windows, of which those of the second step have nothing to learn."""

        def __getitem__(self, index):
            return whole[index] if index < 4 else whole[index]._replace(trained=whole[index].trained & False)

    trainer.job.samples = Silent()
    trainer.fit()
    first, second = lines(tmp_path)
    assert first["loss"] > 0 and (second["loss"], second["trained_tokens"]) == (None, 0)
    assert second["smoothed_loss"] == first["smoothed_loss"]


def test_recomputed_activations_give_the_same_losses_to_the_last_bit(unbroken, tmp_path):
    values = tiny_values(unbroken[0])
    values["checkpoint"]["folder"] = str(tmp_path / "run")
    values["distributed"] = {"activation_checkpointing": "full"}
    prepare_trainer(build_recipe(values)).fit()
    assert [row["loss"] for row in lines(tmp_path)] == [row["loss"] for row in lines(unbroken[0])]


@pytest.mark.parametrize("multiplies_bf16, chosen", [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_cpu_multiplies_fastest(monkeypatch, multiplies_bf16, chosen):
    monkeypatch.setattr(checks, "multiplies_bf16", lambda: multiplies_bf16)
    assert checks.choose_precision("auto", torch.device("cpu")) == chosen
    assert checks.choose_precision("fp32", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize("multiplies_bf16", [multiplies_bf16(), False])
def test_bf16_is_near_fp32_and_its_slowness_is_said(unbroken, tmp_path, monkeypatch, multiplies_bf16):
    monkeypatch.setattr(setup, "multiplies_bf16", lambda: multiplies_bf16)
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: multiplies_bf16)
    heard = []
    prepare_trainer(recipe(tmp_path, unbroken, precision="bf16", steps=3), listeners=[heard.append]).fit()
    assert any("slower than fp32" in getattr(event, "text", "") for event in heard) == (not multiplies_bf16)
    for row, expected in zip(lines(tmp_path), lines(unbroken[0]), strict=False):
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.01)


@pytest.mark.parametrize("kind", ["llama", "long_short_transformer"])
def test_the_baselines_train_with_the_same_code(unbroken, tmp_path, kind):
    values = tiny_values(unbroken[0], steps=4)
    values["checkpoint"]["folder"] = str(tmp_path / "run")
    values["model"]["model_type"] = kind
    assert prepare_trainer(build_recipe(values)).fit().status == "done"
    rows, twin = lines(tmp_path), lines(unbroken[0])
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [row["trained_tokens"] for row in rows] == [row["trained_tokens"] for row in twin[:4]]


def test_an_interrupted_validation_is_made_up_for_on_resume(unbroken, tmp_path):
    heard = threading.Event()

    def stop(event):
        if isinstance(event, events.Stopping):
            heard.set()
        if isinstance(event, events.Validating) and not heard.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            assert heard.wait(10)

    same = recipe(tmp_path, unbroken)
    assert prepare_trainer(same, listeners=[stop]).fit().step == 3
    assert lines(tmp_path, "validation") == []
    prepare_trainer(same, start=Start(resume=True)).fit()
    assert lines(tmp_path, "validation") == lines(unbroken[0], "validation")


def test_the_order_of_events(unbroken, tmp_path):
    heard = []
    prepare_trainer(recipe(tmp_path, unbroken, steps=2, validation_every=2), listeners=[heard.append]).fit()
    names = [type(event).__name__ for event in heard]
    assert names[names.index("Started") :] == [
        "Started", "StepDone", "StepDone", "Validating", "Validating", "Validated", "Saving", "Saved", "Ended"
    ]  # fmt: skip
    ended = heard[-1]
    assert ended.status == "done" and ended.validation_loss == heard[-4].loss and ended.bits_per_byte > 0


def test_listeners_are_closed_however_a_run_ends(unbroken, tmp_path):
    class Listener:
        closed = 0

        def __call__(self, event):
            if isinstance(event, events.StepDone):
                raise RuntimeError("of the listener")

        def close(self):
            self.closed += 1

    listener = Listener()
    with pytest.raises(RuntimeError, match="of the listener"):
        prepare_trainer(recipe(tmp_path, unbroken), listeners=[listener]).fit()
    assert listener.closed == 1


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't")],
)
def test_too_little_memory_is_one_sentence(tmp_path, error):
    with pytest.raises(HardwareError) as caught, explain_memory(tiny_recipe(tmp_path)):
        raise error
    for part in ("2 x 64 tokens", "micro_batch_size below 2", "activation_checkpointing=full", "--plan"):
        assert part in str(caught.value)


def test_other_runtime_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), explain_memory(tiny_recipe(tmp_path)):
        raise RuntimeError("shapes do not match")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory_mosaics_v2", "llama", "long_short_transformer"])
def test_deterministic_mode_finds_nothing_to_refuse_and_changes_no_bit_on_a_cpu(tmp_path, kind):
    """PyTorch raises where an operation has no form that always gives the same bits."""
    ends = []
    for run, deterministic in (("one", True), ("two", True), ("plain", False)):
        values = tiny_values(tmp_path, steps=3, validation_every=1)
        values["model"]["model_type"] = kind
        values["checkpoint"]["folder"] = str(tmp_path / run)
        values["distributed"] = {"deterministic": deterministic}
        try:
            trainer = prepare_trainer(build_recipe(values))
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            trainer.fit()
        finally:
            torch.use_deterministic_algorithms(False)
        ends.append(weights(trainer))
    for end in ends[1:]:
        assert all(torch.equal(end[name], tensor) for name, tensor in ends[0].items())

"""Smoothing, metrics.jsonl, TensorBoard, and what is dropped on resume."""

import json
import math
import resource
import threading
import time

import pytest

from mmcore.errors import ConfigError, HardwareError
from mmcore.training.events import Health, Saving, StepDone, Validated
from mmcore.training.metrics import HealthLines, JsonLines, Smoothed, TensorBoard, keep_lines_until


def step(number, total=10, loss=2.0, **values):
    fields = {
        "smoothed_loss": loss, "learning_rate": 1e-3, "gradient_norm": 0.5, "long_term_delay": 70, "trained_tokens": 9,
        "tokens": 10 * number, "tokens_per_second": 100.0, "mfu": 0.4, "memory_bytes": 1, "elapsed_seconds": 1.0,
        "seconds_left": 2.0,
    }  # fmt: skip
    return StepDone(number, total, loss, **(fields | values))


def test_smoothing_is_unbiased_from_the_first_value():
    smoothed = Smoothed(0.9)
    assert math.isnan(smoothed.value)
    assert smoothed.update(5.0) == pytest.approx(5.0)
    values = [5.0, 3.0, 4.0, 1.0]
    for value in values[1:]:
        smoothed.update(value)
    weights = [0.9**3, 0.9**2, 0.9, 1.0]
    assert smoothed.value == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))


def test_smoothing_goes_on_to_the_last_bit_through_json():
    one, two = Smoothed(), Smoothed()
    for value in (1.1, 2.7, 3.14):
        one.update(value)
    two.load(json.loads(json.dumps(one.state())))
    assert one.update(0.1) == two.update(0.1)


def test_lines_are_json_with_kind_and_fields(tmp_path):
    write = JsonLines(tmp_path / "metrics.jsonl", log_every=1)
    write(step(1))
    write(Validated(1, 1.5, None, 100, 0.1))
    write(Saving(1))
    write.close()
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["kind"], first["step"], first["loss"], first["long_term_delay"]) == ("step", 1, 2.0, 70)
    assert second == {
        "kind": "validation", "step": 1, "loss": 1.5, "bits_per_byte": None, "tokens": 100, "seconds": 0.1
    }  # fmt: skip


def test_log_every_keeps_the_last_step_and_all_validations(tmp_path):
    write = JsonLines(tmp_path / "metrics.jsonl", log_every=4)
    for number in range(1, 11):
        write(step(number))
    write(Validated(7, 1.5, 0.5, 100, 0.1))
    write.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10, 7]


def test_numbers_that_are_not_finite_stay_json(tmp_path):
    write = JsonLines(tmp_path / "metrics.jsonl", log_every=1)
    write(Validated(1, math.nan, math.inf, 100, 0.1))
    write.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line["loss"] is None and line["bits_per_byte"] is None


def test_lines_after_the_resumed_step_and_a_torn_one_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = "".join(json.dumps({"kind": "step", "step": n}) + "\n" for n in (1, 2, 3))
    path.write_text(kept + json.dumps({"kind": "step", "step": 4}) + "\n" + '{"kind": "step", "st')
    assert keep_lines_until(path, 3) == 2
    assert path.read_text() == kept
    assert keep_lines_until(path, 3) == 0
    assert keep_lines_until(tmp_path / "missing.jsonl", 3) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_reads_back_what_was_written_and_hides_the_broken_end(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoard(tmp_path, 1, 0)
    for number in (1, 2, 3, 4):
        first(step(number, loss=float(number)))
    first.close()
    time.sleep(1.1)  # TensorBoard orders the files of sessions by the second in their names
    second = TensorBoard(tmp_path, 1, 2)
    second(step(3, loss=30.0))
    second(Validated(3, 1.5, None, 100, 0.1))
    second.close()
    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("step/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(e.step, e.value) for e in read.Scalars("validation/loss")] == [(3, 1.5)]
    assert "validation/bits_per_byte" not in read.Tags()["scalars"]


@pytest.fixture
def no_room():
    """Files of this process may not grow: a full disk takes one to mount."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", [TensorBoard, JsonLines])
def test_no_room_between_two_saves_is_one_sentence_that_names_the_place(tmp_path, kind, no_room):
    threads = threading.active_count()
    listener = kind(tmp_path / "out", 1, 0) if kind is TensorBoard else kind(tmp_path / "out", 1)
    assert threading.active_count() == threads, "one that fails would print its traceback over the run's display"
    no_room(8192)
    with pytest.raises(HardwareError, match="out may not grow further: .* go on with --resume"):
        for number in range(1, 100):
            listener(step(number, total=100))
    with pytest.raises(HardwareError, match="out may not grow further"):
        listener.close()


def test_a_run_folder_that_is_moved_away_is_one_sentence(tmp_path):
    (tmp_path / "run").mkdir()
    lines = HealthLines(tmp_path / "run/health.jsonl")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="run/health.jsonl cannot be written, since a folder on the way to it is gone"):
        lines(Health(5, ({"layer": 0, "memory": "long_term", "entropy": [0.5]},), 0.1))

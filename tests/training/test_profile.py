"""Traces of a run's steps, and W&B, whose package is stood in for."""

import json
import sys
from types import SimpleNamespace

import pytest

from mmcore.config import build_recipe
from mmcore.errors import ConfigError
from mmcore.training import events
from mmcore.training.profile import allocated
from mmcore.training.setup import Start, prepare_trainer
from tests.helpers.tiny_run import tiny_values


@pytest.mark.slow
def test_steps_are_traced_and_the_files_can_be_read(tmp_path):
    heard = []
    trainer = prepare_trainer(build_recipe(tiny_values(tmp_path, steps=6)), listeners=[heard.append], profile=(3, 4))
    assert trainer.fit().status == "done"
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {
        "trace-rank-00000.json", "operators-rank-00000.txt", "memory-rank-00000.tsv"
    }  # fmt: skip
    trace = json.loads((folder / "trace-rank-00000.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum("Optimizer.step" in name for name in names) == 2  # two steps, no more
    assert any(name.startswith("aten::") for name in names)
    rows = [line.split("\t") for line in (folder / "memory-rank-00000.tsv").read_text().splitlines()]
    assert rows[0] == ["microseconds", "bytes"] and len(rows) > 100
    assert max(int(size) for _, size in rows[1:]) > 2 * 64 * 384 * 4  # at least a chunk of logits
    assert "Self CPU" in (folder / "operators-rank-00000.txt").read_text()
    (notice,) = [e.text for e in heard if isinstance(e, events.Notice) and "profiled" in e.text]
    assert "steps 3 to 4" in notice and "ui.perfetto.dev" in notice and "MiB" in notice
    with pytest.raises(ConfigError, match="--profile 2:3: the run is at step 6 already"):
        prepare_trainer(build_recipe(tiny_values(tmp_path, steps=8)), start=Start(resume=True), profile=(2, 3)).fit()


def test_steps_that_do_not_come_are_said(tmp_path):
    heard = []
    recipe = build_recipe(tiny_values(tmp_path, steps=2))
    assert prepare_trainer(recipe, listeners=[heard.append], profile=(5, 6)).fit().status == "done"
    (text,) = [event.text for event in heard if isinstance(event, events.Notice) and "profiled" in event.text]
    assert text == "steps 5 to 6 are not profiled: the run ended before"


def test_allocations_add_up():
    def memory(at, size, device=0):
        return {"name": "[memory]", "ts": at, "args": {"Bytes": size, "Device Type": device}}

    trace = {"traceEvents": [memory(12.0, 8), memory(10.0, 100), memory(11.0, 5, 1), memory(13.5, -100), {"name": "aten::mm"}]}
    assert allocated(trace) == [(0.0, 100), (2.0, 108), (3.5, 8)]


class FakeWandb:
    def __init__(self):
        self.settings, self.rows, self.metrics, self.finished = [], [], [], 0

    def init(self, **settings):
        self.settings.append(settings)
        return SimpleNamespace(
            log=self.rows.append, finish=self.finish, define_metric=lambda *a, **k: self.metrics.append((a, k))
        )

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_metrics_and_a_resumed_run_goes_on_in_its_place(tmp_path, monkeypatch):
    values, fake = tiny_values(tmp_path, steps=2, wandb="mosaics"), FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mm\[wandb\]'"):
        prepare_trainer(build_recipe(values))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    prepare_trainer(build_recipe(values)).fit()
    prepare_trainer(build_recipe(tiny_values(tmp_path, steps=3, wandb="mosaics")), start=Start(resume=True)).fit()
    first, second = fake.settings
    assert first["project"] == "mosaics" and first["id"] == second["id"] and first["resume"] == "allow"
    assert first["config"]["training"]["steps"] == 2
    assert [row["step"] for row in fake.rows if "step/loss" in row] == [1, 2, 3]
    assert all(isinstance(value, (int, float)) for row in fake.rows for value in row.values())
    assert any("validation/loss" in row for row in fake.rows) and fake.finished == 2

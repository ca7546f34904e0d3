"""Steps that go wrong on one of two ranks, and what is seen of a run on two: both ranks do the same."""

import json

import numpy as np
import pytest

from tests.distributed import faulty
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("faulty")


@pytest.fixture(scope="module")
def ranks(base):
    return run_ranks(faulty.scenes, 2, str(base), str(base))


def both(ranks, scene):
    """What the two ranks found, which must be the same but for the weights' type."""
    one, two = (found[scene] for found in ranks)
    for name in one.keys() - {"weights", "health"}:
        assert one[name] == two[name], name
    assert all(np.array_equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    return one


def test_a_gradient_that_is_nan_on_one_rank_skips_the_step_on_both(ranks, base):
    found = both(ranks, "gradient")
    assert found["status"] == "done" and found["still"] == [3, 4]
    assert found["positions"] == {step: 4 * step for step in range(1, 9)}
    assert [step for step, _ in found["skipped"]] == [3, 4]
    assert "the gradient norm is nan (first in " in found["skipped"][0][1] and "on samples 8-11 (rank" in found["skipped"][0][1]
    assert all(np.isfinite(weight).all() for weight in found["weights"].values())
    state = json.loads((base / "gradient/checkpoints/step-000008/trainer.json").read_text())
    assert state["faults"]["left_out"] == [[8, 12], [12, 16]] and state["optimizer_steps"] == {"*": 6}


def test_a_loss_that_is_nan_on_one_rank_stops_both_and_names_it(ranks, base):
    found = both(ranks, "loss")
    assert "step 5 stopped before its update: the loss is nan on samples 18-19 (rank 1)" in found["error"]
    assert list(found["losses"]) == [1, 2, 3, 4]
    resumed = both(ranks, "resumed")
    assert resumed["status"] == "done" and list(resumed["losses"]) == [5, 6, 7, 8]


def test_a_spike_on_one_rank_takes_both_back(ranks):
    found = both(ranks, "spike")
    assert found["status"] == "done" and found["back"] == [(4, 6, (16, 24))]
    assert found["positions"] == {1: 4, 2: 8, 3: 12, 4: 16, 5: 28, 6: 32, 7: 36, 8: 40, 9: 44}


def test_health_of_shared_out_weights_is_that_of_one_process(ranks, base, tmp_path):
    found = both(ranks, "sight")
    trainer = faulty.prepare_trainer(faulty.recipe(tmp_path / "alone", base, steps=4, health_every=2))
    heard = []
    trainer.listeners.append(heard.append)
    trainer.fit()
    alone = [event.memories for event in heard if isinstance(event, faulty.events.Health)]
    assert len(found["health"]) == len(alone) == 2
    for mine, theirs in zip(found["health"], alone, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.keys() == other.keys()
            assert (one["layer"], one["memory"]) == (other["layer"], other["memory"])
            for name in one.keys() - {"layer", "memory"}:
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    rows = [json.loads(line) for line in (base / "sight/health.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]  # rank 0 alone writes


def test_both_ranks_leave_a_trace(ranks, base):
    folder = base / "sight" / "profile"
    assert {path.name for path in folder.iterdir()} == {
        f"{what}-rank-0000{rank}.{end}" for rank in (0, 1) for what, end in (("trace", "json"), ("operators", "txt"), ("memory", "tsv"))
    }  # fmt: skip
    for rank in (0, 1):
        trace = json.loads((folder / f"trace-rank-0000{rank}.json").read_text())
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert any("gloo:" in name or "all_gather" in name for name in names)

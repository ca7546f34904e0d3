"""Trials: found again, made again when anything changed, reported when they fail; and the page made of them."""

import dataclasses
import json
from pathlib import Path

import pytest

from mmcore.claims import plan, report, work
from mmcore.claims.languages import Recall
from mmcore.claims.plan import LONG_SHORT, MOSAIC, TASKS, TRANSFORMER
from mmcore.claims.trial import Task, Trial, run
from mmcore.model.accounting import flops_per_token, parameters, read_flops_per_token

RECIPES = Path(__file__).parents[2] / "recipes" / "claims"
SHORT = {
    "recall": ["training.steps=3", "training.batch_size=4"],
    "classes": ["training.steps=2", "training.batch_size=1"],
}


@pytest.mark.parametrize("task", TASKS)
def test_twins_have_as_many_parameters_and_flops(task):
    """Matched within 1 % and 2 %."""
    mosaic, twin = (
        plan.trial(RECIPES, task, model, 1e-3, 1, {}).load(Path("x")) for model in (MOSAIC, TRANSFORMER)
    )
    assert parameters(twin.model)["total"] == pytest.approx(parameters(mosaic.model)["total"], rel=0.01)
    flops = [flops_per_token(r.model) + read_flops_per_token(r.model, r.training.sequence_length) for r in (mosaic, twin)]
    assert flops[0] == pytest.approx(flops[1], rel=0.02)
    assert dataclasses.replace(twin, model=mosaic.model, checkpoint=mosaic.checkpoint, name=mosaic.name) == mosaic


def test_the_plan_tries_every_rate_and_then_every_seed():
    trials = plan.sweep(RECIPES, {})
    assert len(trials) == len(set(trials)) == 2 * (4 + 3 * 3)  # text has a rate more
    results = {t: {"loss": abs(t.rate - (1e-2 if t.model == TRANSFORMER else 5e-3))} for t in trials}
    rates = plan.best_rates(results)
    assert rates["recall", TRANSFORMER] == rates["recall", LONG_SHORT] == 1e-2
    assert rates["recall", MOSAIC] == rates["recall", plan.FIXED_DELAY] == rates["classes", plan.NO_GATES] == 5e-3
    final = plan.final(RECIPES, {}, rates)
    assert len(final) == 3 * len(rates)
    assert len(set(final) & set(trials)) == 2 * len(TASKS)  # the sweep's seed counts


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model"), [("recall", MOSAIC), ("recall", LONG_SHORT), ("recall", plan.NO_GATES),
                                             ("classes", TRANSFORMER), ("classes", plan.FIXED_BANDWIDTH)])  # fmt: skip
def test_a_trial_gives_what_the_page_needs(task, model, tmp_path):
    small = dataclasses.replace(TASKS[task], episodes=2, sizes=TASKS[task].sizes[:2])
    trial = plan.trial(RECIPES, task, model, 3e-3, 1, SHORT)
    found = json.loads(json.dumps(run(trial, small, tmp_path)))
    assert found["parameters"] > 100_000
    assert list(found["accuracy"]) == [str(size) for size in small.sizes]
    assert ("accuracy_without_long_term" in found) == (model != TRANSFORMER)
    assert [point["step"] for point in found["curve"]][-1] == trial.load(tmp_path).training.steps
    assert ("tuned" in found) == (task == "recall")
    if task == "recall":
        assert list(found["tuned"]) == [str(step) for step in small.tuned_steps]


@pytest.mark.slow
def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    trial, task = plan.trial(RECIPES, "recall", MOSAIC, 3e-3, 1, SHORT), TASKS["recall"]
    heard = []
    first = work.run_all([(trial, task)], tmp_path, 1, lambda t, found, unfinished: heard.append((t, unfinished)))
    assert heard == [(trial, [])]
    again = work.run_all([(trial, task)], tmp_path, 1, lambda t, found, unfinished: heard.append((t, unfinished)))
    assert (again, heard) == (first, [(trial, [])])
    changed = dataclasses.replace(trial, settings=("training.steps=2", "training.batch_size=4"))
    assert work.finished(tmp_path, changed, task) is None
    assert work.finished(tmp_path, trial, dataclasses.replace(task, episodes=3)) is None
    work.result_file(tmp_path, trial).write_text("{")  # cut short
    assert work.finished(tmp_path, trial, task) is None


@pytest.mark.slow
def test_a_trial_that_fails_says_why(tmp_path):
    trial = Trial("recall", MOSAIC, RECIPES / "recall.yaml", ("model.vocab_size=7",), 1e-3, 1)
    with pytest.raises(RuntimeError, match="model.vocab_size is 7 and the language has"):
        work.run_all([(trial, TASKS["recall"])], tmp_path, 1)


def made_up(trial, mosaic_keeps=1.0, twin_keeps=0.0, gap=0.0):
    """A result as `run` gives it, through JSON."""
    task, mosaic = TASKS[trial.task], trial.model.startswith(MOSAIC)
    base = {"parameters": 1000, "flops_per_token": 2e6, "steps": 10, "tokens": 10 * 16 * 256, "seconds": 3.0,
            "loss": 2.0 if mosaic else 2.0 + gap, "bits_per_byte": 1.0}  # fmt: skip
    if task.language is None:
        return base | {"curve": [{"step": 5, "loss": 3.0, "bits_per_byte": 1.5}, {"step": 10, "loss": base["loss"]}]}
    keeps = mosaic_keeps if mosaic else twin_keeps
    accuracy = {str(size): 0.95 if size == task.trained_size else 0.95 * keeps for size in task.sizes}
    found = base | {"accuracy": accuracy, "curve": [{"step": 2, "loss": 3.0, "accuracy": 0.1},
                                                    {"step": 10, "loss": 2.0, "accuracy": 0.95}]}  # fmt: skip
    if trial.model != TRANSFORMER:
        found["accuracy_without_long_term"] = {str(size): 0.01 for size in task.sizes}
    return found | ({"tuned": {str(step): 0.5 for step in task.tuned_steps}} if task.tuned_factor else {})


def page(tmp_path, **how):
    sweep = plan.sweep(RECIPES, {})
    results = {t: made_up(t, **how) for t in sweep}
    rates = plan.best_rates(results)
    results |= {t: made_up(t, **how) for t in plan.final(RECIPES, {}, rates)}
    about = {"machine": "a laptop", "time": "1 minute", "trials": str(len(results))}
    path = report.write(results, rates, about, tmp_path / "claims")
    names = {p.stem for p in (tmp_path / "claims").glob("*.svg")}
    assert names == {"text", "recall", "classes", "automata", "tuning", "ablations"}
    return path.read_text()


@pytest.mark.slow
def test_the_page_says_what_shows_and_what_does_not(tmp_path):
    text = page(tmp_path / "a", mosaic_keeps=1.0, twin_keeps=0.1, gap=0.01)
    assert "**Shows.** The losses differ by 0.5%." in text
    assert text.count("**Shows.**") == 2  # a mosaic that is as good after one shot has learned nothing from more
    assert "0.95 (0.95-0.95)" in text
    text = page(tmp_path / "b", mosaic_keeps=0.1, twin_keeps=0.1, gap=0.5)
    assert "**Shows.**" not in text
    assert "the mosaic's is 20.0% lower" in text.replace("\n", " ")


def test_the_language_of_recall_fits_its_samples():
    language = TASKS["recall"].language
    assert isinstance(language, Recall)
    longest = 2 + language.most_facts * (3 + language.filler) + 3 * language.questions
    trial = plan.trial(RECIPES, "recall", MOSAIC, 1e-3, 1, {}).load(Path("x"))
    assert longest <= trial.training.sequence_length + 1
    assert isinstance(TASKS["recall"], Task)

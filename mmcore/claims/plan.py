"""Which trials are made, and in what order: a sweep of the learning rate first, then more seeds and the ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcore.claims.languages import Automata, Classes, Recall
from mmcore.claims.trial import Task, Trial

MOSAIC, TRANSFORMER, LONG_SHORT = "mosaic", "transformer", "long-short transformer"
FIXED_DELAY, FIXED_BANDWIDTH, NO_GATES = "mosaic, fixed delay", "mosaic, fixed bandwidth", "mosaic, keys without gates"
PATIENT = "transformer, 5,000 steps"
"""The twin where it has not learned a task in the steps that the mosaic needs, trained for five to eight times as many."""

SEEDS = (1, 2, 3)
"""The first is the sweep's too."""

_FACTS = 16
TASKS = {
    task.name: task
    for task in (
        Task("text", "text", None),
        Task("recall", "recall", Recall(words=128, key=1, value=1, most_facts=_FACTS, filler=4, questions=16),
             trained_size=_FACTS, sizes=tuple(_FACTS * n for n in (1, 2, 4, 8)), tuned_factor=8),
        Task("classes", "classes", Classes(classes=4, typical=4, length=4, noise=0.2), trained_size=4,
             sizes=(1, 2, 4, 8, 16, 32), questions=4),
        Task("automata", "automata", Automata(), trained_size=11, sizes=(1, 2, 4, 8, 16, 32), questions=10),
    )
}  # fmt: skip

RATES = (2e-3, 5e-3, 1e-2, 2e-2)
"""Tried for real text, whose best is the third; the generated languages take the first three."""

_VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    MOSAIC: ("", ()),
    TRANSFORMER: ("-transformer", ()),
    PATIENT: ("-transformer", ("training.steps=5000",)),
    LONG_SHORT: ("", ("model.model_type=long_short_transformer",)),
    FIXED_DELAY: ("", ("model.long_term_delay_range=[4, 4]",)),
    FIXED_BANDWIDTH: ("", ("model.adaptive_bandwidth=false",)),
    NO_GATES: ("", ("model.gated_keys=false",)),
}
"""Model -> which recipe of a task, and what is set over it."""

SWEPT = (MOSAIC, TRANSFORMER)
"""Models whose learning rate is swept, in every task."""

INHERITED = {
    "recall": {LONG_SHORT: TRANSFORMER, FIXED_DELAY: MOSAIC, FIXED_BANDWIDTH: MOSAIC, NO_GATES: MOSAIC},
    "classes": {FIXED_BANDWIDTH: MOSAIC, NO_GATES: MOSAIC, PATIENT: TRANSFORMER},
    "automata": {PATIENT: TRANSFORMER},
}
"""Task -> ablation -> the model whose best rate it is trained at."""


def rates_of(task: str) -> tuple[float, ...]:
    """The learning rates that a task's sweep tries."""
    return RATES if TASKS[task].language is None else RATES[:3]


def sweep(recipes: Path, settings: Mapping[str, Sequence[str]]) -> list[Trial]:
    """The trials that find each model's learning rate."""
    return [
        trial(recipes, task, model, rate, SEEDS[0], settings) for task in TASKS for model in SWEPT for rate in rates_of(task)
    ]  # fmt: skip


def best_rates(results: Mapping[Trial, Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """(task, model) -> the rate whose held-out loss in the training distribution is least; ablations inherit theirs."""
    rates: dict[tuple[str, str], float] = {}
    for task in TASKS:
        for model in SWEPT:
            tried = [t for t in results if (t.task, t.model, t.seed) == (task, model, SEEDS[0])]
            rates[task, model] = min(tried, key=lambda t: results[t]["loss"]).rate
        rates |= {(task, model): rates[task, base] for model, base in INHERITED.get(task, {}).items()}
    return rates


def final(recipes: Path, settings: Mapping[str, Sequence[str]], rates: Mapping[tuple[str, str], float]) -> list[Trial]:
    """Every model of every task at its rate, with every seed."""
    return [trial(recipes, task, model, rate, seed, settings) for (task, model), rate in rates.items() for seed in SEEDS]


def trial(
    recipes: Path, task: str, model: str, rate: float, seed: int, settings: Mapping[str, Sequence[str]]
) -> Trial:
    """The trial of one model, rate and seed; `settings` has further `section.key=value` for tasks by name."""
    ending, changes = _VARIANTS[model]
    path = recipes / f"{TASKS[task].recipe}{ending}.yaml"
    return Trial(task, model, path, (*changes, *settings.get(task, ())), rate, seed)

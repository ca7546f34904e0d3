"""python -m mmcore.claims: trains the small models of the claims and writes docs/claims. `make claims` calls it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcore.claims import plan, report, work
from mmcore.claims.plan import TASKS
from mmcore.claims.trial import Trial
from mmcore.errors import MMError
from mmcore.training.run_folder import cpu_model


class Clock:
    """Prints each result with the time left, from the trials that have been made and those to come."""

    def __init__(self, processes: int):
        self.processes = processes
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def __call__(self, trial: Trial, found: dict[str, Any], unfinished: Sequence[Trial]) -> None:
        self.seconds.setdefault((trial.task, trial.model), []).append(found["seconds"])
        reached = f", accuracy {next(iter(found['accuracy'].values())):.2f}" if "accuracy" in found else ""
        print(
            f"{trial.name}: loss {found['loss']:.3f}{reached} in {_minutes(found['seconds'])}; "
            f"{len(unfinished)} to go, about {_minutes(self._left(unfinished))}",
            flush=True,
        )

    def _left(self, unfinished: Sequence[Trial]) -> float:
        known = [s for many in self.seconds.values() for s in many]
        usual = sum(known) / len(known)

        def expected(trial: Trial) -> float:
            own = self.seconds.get((trial.task, trial.model))
            return sum(own) / len(own) if own else usual

        return sum(map(expected, unfinished)) / self.processes


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mmcore.claims", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/claims"), help="folder of the report")
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="folder of runs; goes on from there")
    parser.add_argument("--recipes", type=Path, default=Path("recipes/claims"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="trials at a time, each on one thread")
    parser.add_argument("--set", action="append", default=[], metavar="TASK.SECTION.KEY=VALUE",
                        help="over a task's recipes: text.data.sources=[{path: ~/texts}], recall.training.steps=50")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.trial:
        work.run_here(asked.trial, TASKS, asked.work)
        return 0
    settings: dict[str, list[str]] = {}
    for given in asked.set:
        task, _, rest = given.partition(".")
        if task not in TASKS or not rest:
            print(f"--set {given}: begin it with a task, one of {', '.join(TASKS)}", file=sys.stderr)
            return 2
        settings.setdefault(task, []).append(rest)
    try:
        _run(asked, settings)
    except MMError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is done", file=sys.stderr)
        return 130
    return 0


def _run(asked: argparse.Namespace, settings: dict[str, list[str]]) -> None:
    began, clock = time.monotonic(), Clock(asked.processes)
    sweep = plan.sweep(asked.recipes, settings)
    results = _all(sweep, asked, clock)
    rates = plan.best_rates(results)
    results |= _all(plan.final(asked.recipes, settings, rates), asked, clock)
    about = {
        "machine": f"an {cpu_model()} with {os.cpu_count()} cores",
        "time": f"{sum(found['seconds'] for found in results.values()) / 60:.0f} minutes",
        "trials": str(len(results)),
    }
    page = report.write(results, rates, about, asked.out)
    print(f"{len(results)} trials; this command took {_minutes(time.monotonic() - began)}. Read {page}")


def _all(trials: list[Trial], asked: argparse.Namespace, clock: Clock) -> dict[Trial, dict[str, Any]]:
    return work.run_all([(t, TASKS[t.task]) for t in trials], asked.work, asked.processes, clock)


if __name__ == "__main__":
    sys.exit(main())

"""A user's task gone through before the work, with no model behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcore.errors import DataError, MMError
from mmcore.evaluation import harness
from mmcore.evaluation.persistent.local import LocalTask

ITEMS = 2


class _Nobody:
    """Answers whatever the harness asks, always alike."""

    rank, world_size = 0, 1

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return [(-1.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        return [-1.0 for _ in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        for request in requests:
            harness.writing(request.args[1], max_length=1 << 30)
        return ["1" for _ in requests]


def rehearse(task: LocalTask) -> None:
    """Measure a few items with nobody answering, metrics and filters included. Raises DataError for a task file that the
    harness cannot work with, which it would otherwise say with a traceback, and for metrics after all the scoring."""
    try:
        harness.run_local(task, _Nobody(), ITEMS)
    except MMError as error:
        raise DataError(f"{task.path}: {error}") from None
    except Exception as error:  # the harness raises errors of every kind, and nothing but it and the file is at work here
        fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(
            f"{task.path}: the harness cannot measure {task.name} as it is defined ({fault}): correct its settings, such as "
            f"metric_list, filter_list or generation_kwargs"
        ) from error

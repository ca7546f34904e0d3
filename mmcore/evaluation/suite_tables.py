"""The results of the suites as tables: the one source of the console's, the Markdown's and the HTML report's figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.evaluation.persistent.benchmarks import CONTEXTUAL, GROUPS, OWN, PERSISTENT
from mmcore.evaluation.ruler import NIAH_TASKS, QA_TASKS

TITLES = {"persistent": "Persistent knowledge", "new_knowledge": "New knowledge", "in_context": "In-context learning"}


@dataclass(frozen=True)
class Table:
    """A table of a section, its cells as they are shown."""

    section: str
    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def labels(report: dict[str, Any]) -> list[str]:
    """A short name for each result: as much of its path as tells the checkpoints apart, and what was removed."""
    paths = [Path(result["checkpoint"]).absolute().parts for result in report["results"]]
    length = next((n for n in range(1, max(map(len, paths)) + 1)
                   if len({path[-n:] for path in paths}) == len(set(paths))), 1)
    return ["/".join(path[-length:]) + ("" if result["variant"] == "whole" else f" {result['variant']}")
            for path, result in zip(paths, report["results"], strict=True)]


def tables(report: dict[str, Any]) -> list[Table]:
    """All tables in the order of a report."""
    return [*_persistent(report), *_new_knowledge(report), *_in_context(report)]


def columns(report: dict[str, Any], suite: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """(name, rows of a suite) of each result that has any."""
    named = zip(labels(report), report["results"], strict=True)
    return [(name, result[suite]) for name, result in named if result.get(suite)]


def mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def shown(value: float | None, interval: list[float] | None = None) -> str:
    """A score with one decimal, with its interval where it has one."""
    if value is None:
        return "-"
    return f"{value:.1f}" if interval is None else f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _persistent(report: dict[str, Any]) -> list[Table]:
    models = columns(report, "persistent")
    found = []
    for group, title, of in (
        (PERSISTENT, "Benchmarks that rest on persistent knowledge", 13),
        (CONTEXTUAL, "Benchmarks that rest on their context", 6),
        (OWN, "Own benchmarks", None),
    ):
        tasks = sorted({row["task"] for _, rows in models for row in rows if row["group"] == group}, key=_order)
        if not tasks:
            continue
        lines = []
        for task in tasks:
            mine = [next((row for row in rows if row["task"] == task), None) for _, rows in models]
            first = next(row for row in mine if row)
            lines.append([task, f"{first['items']:,}", first["metric"], *(shown(row and row["score"]) for row in mine)])
        means = [mean(scores) for scores in group_scores(models, group)]
        if any(value is not None for value in means):
            lines.append(["mean", f"{len(tasks)} of {of}" if of else f"{len(tasks)}", "", *map(shown, means)])
        note = f"The paper's group of {of}. " if of else ""
        header = ["benchmark", "items", "metric", *(name for name, _ in models)]
        found.append(Table("persistent", f"{title}, percent", header, lines,
                           f"{note}Through lm-evaluation-harness, each benchmark by its main metric."))
    return found


def group_scores(models: list[tuple[str, list[dict[str, Any]]]], group: str) -> list[list[float]]:
    """Scores of a group's tasks for each model, those in percent."""
    return [[row["score"] for row in rows if row["group"] == group and row["percent"]] for _, rows in models]


def _order(task: str) -> tuple[int, str]:
    names = list(GROUPS)
    return (names.index(task) if task in names else len(names), task)


def family_score(rows: list[dict[str, Any]], tasks: Iterable[str], length: int) -> float | None:
    """Mean over a family's tasks at a length; None where one that was measured elsewhere is lacking here."""
    tasks = set(tasks)
    return mean(row["score"] for row in rows if row["task"] in tasks and row["length"] == length)


def _new_knowledge(report: dict[str, Any]) -> list[Table]:
    models = columns(report, "new_knowledge")
    if not models:
        return []
    lengths = sorted({row["length"] for _, rows in models for row in rows})
    measured = {row["task"] for _, rows in models for row in rows}
    header = ["model", *(f"{length:,}" for length in lengths)]
    found = []
    for title, family in (("Question answering", QA_TASKS), ("Needles in a haystack", NIAH_TASKS)):
        tasks = [task for task in family if task in measured]
        if len(tasks) > 1:
            lines = [[name, *(shown(family_score(rows, tasks, length)) for length in lengths)] for name, rows in models]
            found.append(Table("new_knowledge", f"{title}: accuracy by length, percent", header, lines,
                               f"Mean of {', '.join(tasks)}. Lengths are tokens, the answer's included."))
        for task in tasks:
            lines = [[name, *(_cell(rows, task, length) for length in lengths)] for name, rows in models]
            items = {row["items"] for _, rows in models for row in rows if row["task"] == task}
            counts = " to ".join(f"{count:,}" for count in sorted({min(items), max(items)}))
            found.append(Table("new_knowledge", f"{task}: accuracy by length, percent", header, lines,
                               f"{counts} items at each length; Wilson intervals of 95 %."))
        if tasks:
            found.append(_depth_table(title, tasks, models, lengths))
    return found


def _cell(rows: list[dict[str, Any]], task: str, length: int) -> str:
    row = next((row for row in rows if row["task"] == task and row["length"] == length), None)
    return shown(row["score"], row["interval"]) if row else "-"


def depth_scores(rows: list[dict[str, Any]], tasks: Iterable[str], length: int) -> list[float | None]:
    """Accuracy by fifth of the context over a family's tasks at a length, items counted alike."""
    chosen = [row["by_depth"] for row in rows if row["task"] in set(tasks) and row["length"] == length]
    found: list[float | None] = []
    for part in zip(*chosen, strict=True):
        items = sum(one["items"] for one in part)
        hits = sum(one["items"] * one["score"] for one in part if one["items"])
        found.append(hits / items if items else None)
    return found


def _depth_table(title: str, tasks: list[str], models: list[tuple[str, list[dict[str, Any]]]], lengths: list[int]) -> Table:
    header = ["model", "length", *(f"{20 * part}-{20 * part + 20} %" for part in range(5))]
    lines = [[name, f"{length:,}", *map(shown, depth_scores(rows, tasks, length))]
             for name, rows in models for length in lengths if depth_scores(rows, tasks, length)]
    return Table("new_knowledge", f"{title}: accuracy by depth of the fact, percent", header, lines,
                 "0 % is the beginning of the context, 100 % its end, next to the question.")


def _in_context(report: dict[str, Any]) -> list[Table]:
    models = columns(report, "in_context")
    found = []
    for task, kind in sorted({(row["task"], row["labels"]) for _, rows in models for row in rows}):
        chosen = [(name, {row["shots"]: row for row in rows if (row["task"], row["labels"]) == (task, kind)})
                  for name, rows in models]
        shots = sorted({count for _, rows in chosen for count in rows})
        first = next(row for _, rows in chosen for row in rows.values())
        header = ["model", *(f"{count} shot{'s' * (count != 1)}" for count in shots)]
        for what, cell in (
            ("best of the prompt forms", lambda row: shown(row["best"]["score"], row["best"]["interval"])),
            ("mean of the prompt forms", lambda row: shown(row["mean"], row["mean_interval"])),
        ):
            lines = [[name, *(cell(rows[count]) if count in rows else "-" for count in shots)] for name, rows in chosen]
            note = (f"{first['classes']} classes, chance {first['chance']:.1f} %, {first['items']:,} queries. " + (
                "Wilson intervals of 95 %, which take no account of the choice of the best." if what.startswith("best")
                else "Wilson intervals of 95 %, a query counted once."))
            found.append(Table("in_context", f"{task}, {kind} labels: accuracy, {what}, percent", header, lines, note))
    return found


__all__ = ["OWN", "TITLES", "Table", "columns", "depth_scores", "family_score", "group_scores", "labels", "mean", "shown",
           "tables"]

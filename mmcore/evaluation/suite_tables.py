"""The results of the suites as tables: the one source of the console's, the Markdown's and the HTML report's figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmcore.evaluation.intervals import wilson
from mmcore.evaluation.persistent.benchmarks import CONTEXTUAL, GROUPS, PERSISTENT
from mmcore.evaluation.persistent.local import OWN
from mmcore.evaluation.ruler import NIAH_TASKS, QA_TASKS

TITLES = {"glance": "At a glance", "persistent": "Persistent knowledge", "new_knowledge": "New knowledge",
          "in_context": "In-context learning"}
FAMILIES = (("question answering", QA_TASKS), ("needles in a haystack", NIAH_TASKS))
RESTS_ON = {PERSISTENT: "the weights", CONTEXTUAL: "the context", OWN: "own"}
BOLD = "Bold: the greatest of what is compared."
INTERVALS = "Intervals are Wilson's, 95 %."

Rows = list[dict[str, Any]]
Models = list[tuple[str, Rows]]
"""(name, rows of a suite) of each result."""


@dataclass(frozen=True)
class Cell:
    """What stands in a table."""

    text: str
    small: str = ""
    """What qualifies it."""
    interval: tuple[float, float] | None = None
    value: float | None = None
    """To find the best by."""
    best: bool = False
    beyond: bool = False
    """Measured at a length beyond the trained context."""

    @property
    def below(self) -> str:
        """What stands beneath it: what qualifies it, or its interval."""
        return f"[{self.interval[0]:.1f}, {self.interval[1]:.1f}]" if self.interval else self.small

    def __str__(self) -> str:
        return f"{self.text} {self.below}" if self.below else self.text


@dataclass(frozen=True)
class Table:
    """A table of a section."""

    section: str
    key: str
    """Its name, for links."""
    title: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""
    groups: int = 0
    """So many columns at the left divide the rows into groups: equal neighbours are one cell."""
    words: int = 1
    """So many columns at the left hold words."""
    detail: bool = False
    """Left to the report's pages; a terminal shows what it is summed up in."""


def labels(report: dict[str, Any]) -> list[str]:
    """A short name for each result: as much of its path as tells the checkpoints apart, and what was removed."""
    paths = [Path(result["checkpoint"]).absolute().parts for result in report["results"]]
    length = next((n for n in range(1, max(map(len, paths)) + 1)
                   if len({path[-n:] for path in paths}) == len(set(paths))), 1)
    return ["/".join(path[-length:]) + ("" if result["variant"] == "whole" else f" {result['variant']}")
            for path, result in zip(paths, report["results"], strict=True)]


def tables(report: dict[str, Any]) -> list[Table]:
    """All tables in the order of a report."""
    return [*_glance(report), *_persistent(report), *_new_knowledge(report), *_in_context(report)]


def columns(report: dict[str, Any], suite: str) -> Models:
    """(name, rows of a suite) of each result that has any."""
    named = zip(labels(report), report["results"], strict=True)
    return [(name, result[suite]) for name, result in named if result.get(suite)]


def families(models: Models) -> list[tuple[str, list[str]]]:
    """(name, tasks that were measured) of each family of new knowledge that has any."""
    measured = {row["task"] for _, rows in models for row in rows}
    return [(title, chosen) for title, tasks in FAMILIES if (chosen := [task for task in tasks if task in measured])]


def mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def score(value: float | None, interval: Sequence[float] | None = None, beyond: bool = False) -> Cell:
    """A score with one decimal and its interval where it has one."""
    if value is None:
        return Cell("-")
    return Cell(f"{value:.1f}", interval=tuple(interval) if interval else None, value=value, beyond=beyond)


def words(*texts: str) -> list[Cell]:
    return [Cell(text) for text in texts]


def _best(lines: list[list[Cell]], sets: Iterable[list[tuple[int, int]]]) -> list[list[Cell]]:
    """The lines with the greatest values of each set of (row, column) marked, where several are compared."""
    lines = [list(line) for line in lines]
    for places in sets:
        found = [(place, lines[place[0]][place[1]]) for place in places if lines[place[0]][place[1]].value is not None]
        top = max((cell.value for _, cell in found), default=0)
        for (row, column), cell in found if len(found) > 1 else ():
            lines[row][column] = replace(cell, best=cell.value == top)
    return lines


def _best_by_column(lines: list[list[Cell]], words: int, groups: int = 0, name: int | None = None) -> list[list[Cell]]:
    """Rows of one group are compared, a column at a time; `name`: rows with another word in this column are not."""
    sets: dict[tuple[Any, ...], list[tuple[int, int]]] = {}
    for row, line in enumerate(lines):
        group = tuple(cell.text for cell in line[:groups]) + ((line[name].text,) if name is not None else ())
        for column in range(words, len(line)):
            sets.setdefault((*group, column), []).append((row, column))
    return _best(lines, sets.values())


def _glance(report: dict[str, Any]) -> list[Table]:
    """The means of every suite, a column for each model."""
    results = report["results"]
    lines: list[list[Cell]] = []

    def add(suite: str, what: str, chosen: Callable[[dict], bool], value: Callable[[dict], float]) -> None:
        rows = _shared([[row for row in result.get(suite, []) if chosen(row)] for result in results])
        if any(rows):
            chances = {row["task"]: row.get("chance", 0.0) for found in rows for row in found}
            known = all(chance is not None for chance in chances.values())
            lines.append([Cell(TITLES[suite]), Cell(what, f"{len(chances)} task{'s' * (len(chances) != 1)}"),
                          score(mean(chances.values()) if known else None),
                          *(score(mean(map(value, found))) for found in rows)])

    for group in (PERSISTENT, CONTEXTUAL, OWN):
        add("persistent", "own benchmarks" if group == OWN else f"what rests on {RESTS_ON[group]}",
            lambda row, group=group: row["group"] == group and row["percent"], lambda row: row["score"])
    lengths = sorted({row["length"] for result in results for row in result.get("new_knowledge", [])})
    for title, tasks in FAMILIES:
        for length in dict.fromkeys((lengths[0], lengths[-1])) if lengths else ():
            add("new_knowledge", f"{title}, {length:,} tokens",
                lambda row, tasks=tasks, length=length: row["task"] in tasks and row["length"] == length,
                lambda row: row["score"])
    most = max((row["shots"] for result in results for row in result.get("in_context", [])), default=0)
    for kind in ("semantic", "anonymous"):
        add("in_context", f"{kind} labels, {most} shot{'s' * (most != 1)}",
            lambda row, kind=kind: (row["labels"], row["shots"]) == (kind, most), lambda row: row["best"]["score"])
    if not lines:
        return []
    lines = _best(lines, [[(row, 3 + column) for column in range(len(results))] for row in range(len(lines))])
    header = ["dimension", "measurement", "chance", *labels(report)]
    note = f"Means over tasks, percent; in-context learning with the best prompt form. {BOLD}"
    return [Table("glance", "glance", "All that was measured, in means", header, lines, note, groups=1, words=2)]


def _persistent(report: dict[str, Any]) -> list[Table]:
    models = columns(report, "persistent")
    if not models:
        return []
    lines: list[list[Cell]] = []
    means: list[list[Cell]] = []
    for group in (PERSISTENT, CONTEXTUAL, OWN):
        tasks = sorted({row["task"] for _, rows in models for row in rows if row["group"] == group}, key=_order)
        for task in tasks:
            mine = [next((row for row in rows if row["task"] == task), None) for _, rows in models]
            first = next(row for row in mine if row)
            lines.append([Cell(RESTS_ON[group]), Cell(task, f"{first['metric']}, {first['items']:,} items"),
                          score(first["chance"]),
                          *(score(row["score"], row["interval"]) if row else Cell("-") for row in mine)])
        shared = _shared([[row for row in rows if row["group"] == group and row["percent"]] for _, rows in models])
        if any(shared):
            of = {PERSISTENT: " of 13", CONTEXTUAL: " of 6"}.get(group, "")
            means.append(_mean_line(RESTS_ON[group], of, shared))
    if len(means) > 1:
        means.append(_mean_line("all", "", _shared([[row for row in rows if row["percent"]] for _, rows in models])))
    lines += means
    lines = _best(lines, [[(row, 3 + column) for column in range(len(models))] for row in range(len(lines))])
    note = ("Through lm-evaluation-harness, each benchmark by its main metric, percent unless that is a perplexity. The "
            f"groups are the paper's 13 and 6 (its tables 1, 2 and 9). chance: what guessing gives. {INTERVALS} {BOLD}")
    header = ["rests on", "benchmark", "chance", *(name for name, _ in models)]
    return [Table("persistent", "benchmarks", "Benchmarks", header, lines, note, groups=1, words=2)]


def _shared(columns: list[list[dict]]) -> list[list[dict]]:
    """The rows of each column whose tasks all columns have that have any: a mean over other tasks, where some were passed
    over, would compare what cannot be compared."""
    present = [{row["task"] for row in rows} for rows in columns if rows]
    shared = set.intersection(*present) if present else set()
    return [[row for row in rows if row["task"] in shared] for rows in columns]


def _mean_line(what: str, of: str, columns: list[list[dict]]) -> list[Cell]:
    count = len({row["task"] for rows in columns for row in rows})
    means = [mean(row["score"] for row in rows) for rows in columns]
    return [Cell("mean"), Cell(what, f"{count}{of} benchmarks"), Cell(""), *map(score, means)]


def _order(task: str) -> tuple[int, str]:
    names = list(GROUPS)
    return (names.index(task) if task in names else len(names), task)


def family_score(rows: Rows, tasks: Iterable[str], length: int) -> float | None:
    """Mean over a family's tasks at a length."""
    tasks = set(tasks)
    return mean(row["score"] for row in rows if row["task"] in tasks and row["length"] == length)


def family_interval(rows: Rows, tasks: Iterable[str], length: int) -> list[float] | None:
    """Wilson's interval in percent of a family's mean at a length, the items of all its tasks counted together."""
    chosen = [row for row in rows if row["task"] in set(tasks) and row["length"] == length]
    items = sum(row["items"] for row in chosen)
    return [100 * end for end in wilson(family_score(rows, tasks, length) / 100 * items, items)] if chosen else None


def _new_knowledge(report: dict[str, Any]) -> list[Table]:
    models = columns(report, "new_knowledge")
    if not models:
        return []
    trained = {name: result["trained_context"] for name, result in zip(labels(report), report["results"], strict=True)}
    lengths = sorted({row["length"] for _, rows in models for row in rows})
    found = []
    for title, tasks in families(models):
        short = "qa" if set(tasks) <= set(QA_TASKS) else "needles"
        lines = [[Cell(name), Cell(f"{trained[name]:,}"),
                  *(score(family_score(rows, tasks, length), family_interval(rows, tasks, length), length > trained[name])
                    for length in lengths)] for name, rows in models]
        found.append(Table(
            "new_knowledge", f"{short}-by-length", f"{title.capitalize()}: accuracy by length, percent",
            ["model", "trained at", *(f"{length:,}" for length in lengths)], _best_by_column(lines, 2),
            f"Mean of {', '.join(tasks)}; as the paper's tables 3 and 4. Lengths are tokens of prompt and answer; those "
            f"beyond the trained context are shaded on the page. Guessing gives 0. {INTERVALS} {BOLD}"))
        lines = [[Cell(task, _counts(models, task)), Cell(name),
                  *(_cell(rows, task, length, trained[name]) for length in lengths)]
                 for task in tasks for name, rows in models]
        if len(tasks) > 1:
            found.append(Table(
                "new_knowledge", f"{short}-tasks", f"{title.capitalize()}: each task, percent",
                ["task", "model", *(f"{length:,}" for length in lengths)], _best_by_column(lines, 2, groups=1),
                f"{INTERVALS} {BOLD}", groups=1, words=2, detail=True))
        found.append(_depth_table(title, short, tasks, models, lengths))
    return found


def _counts(models: Models, task: str) -> str:
    items = {row["items"] for _, rows in models for row in rows if row["task"] == task}
    return f"{' to '.join(f'{count:,}' for count in sorted({min(items), max(items)}))} items"


def _cell(rows: Rows, task: str, length: int, trained: int) -> Cell:
    row = next((row for row in rows if row["task"] == task and row["length"] == length), None)
    return score(row["score"], row["interval"], length > trained) if row else Cell("-")


def depth_scores(rows: Rows, tasks: Iterable[str], length: int) -> list[float | None]:
    """Accuracy by fifth of the context over a family's tasks at a length, items counted alike."""
    chosen = [row["by_depth"] for row in rows if row["task"] in set(tasks) and row["length"] == length]
    found: list[float | None] = []
    for part in zip(*chosen, strict=True):
        items = sum(one["items"] for one in part)
        hits = sum(one["items"] * one["score"] for one in part if one["items"])
        found.append(hits / items if items else None)
    return found


def _depth_table(title: str, short: str, tasks: list[str], models: Models, lengths: list[int]) -> Table:
    header = ["length", "model", *(f"{20 * part}-{20 * part + 20} %" for part in range(5))]
    lines = [[Cell(f"{length:,}"), Cell(name), *map(score, depth_scores(rows, tasks, length))]
             for length in lengths for name, rows in models if depth_scores(rows, tasks, length)]
    return Table(
        "new_knowledge", f"{short}-by-depth", f"{title.capitalize()}: accuracy by depth of the fact, percent", header,
        _best_by_column(lines, 2, groups=1),
        f"Depth 0 % is the beginning of the context, 100 % its end, next to the question. {BOLD}", groups=1, words=2,
        detail=True)


def _in_context(report: dict[str, Any]) -> list[Table]:
    models = columns(report, "in_context")
    found = []
    for task in sorted({row["task"] for _, rows in models for row in rows}):
        mine = [(name, [row for row in rows if row["task"] == task]) for name, rows in models]
        shots = sorted({row["shots"] for _, rows in mine for row in rows})
        first = next(row for _, rows in mine for row in rows)
        lines = []
        for kind in ("semantic", "anonymous"):
            for name, rows in mine:
                chosen = {row["shots"]: row for row in rows if row["labels"] == kind}
                if not chosen:
                    continue
                found_rows = [chosen.get(count) for count in shots]
                lines.append(words(kind, name, "best") + [
                    score(row["best"]["score"], row["best"]["interval"]) if row else Cell("-") for row in found_rows])
                lines.append(words(kind, name, "mean") + [
                    score(row["mean"], row["mean_interval"]) if row else Cell("-") for row in found_rows])
        tokens = ", ".join(f"{row['head_tokens']:,}" for row in sorted(
            (row for row in mine[0][1] if row["labels"] == lines[0][0].text), key=lambda row: row["shots"]))
        note = (f"{first['classes']} classes, {first['items']:,} queries; guessing gives {first['chance']:.1f}. best, mean: "
                f"of the prompt forms (newline or space, shuffled or in order). The examples take {tokens} tokens. "
                f"{INTERVALS} Those of the best take no account of its having been chosen; for the mean a query counts "
                f"once. {BOLD}")
        header = ["labels", "model", "form", *(f"{count} shot{'s' * (count != 1)}" for count in shots)]
        found.append(Table("in_context", f"{task}-by-shots", f"{task}: accuracy by shots, percent", header,
                           _best_by_column(lines, 3, groups=1, name=2), note, groups=2, words=3))
    return found

"""The results of the suites as pictures, each as PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmcore.evaluation.report import COLOURS
from mmcore.evaluation.ruler import NIAH_TASKS, QA_TASKS
from mmcore.evaluation.suite_tables import columns, depth_scores, family_score

WIDTH = 4.4
"""Inches of a panel."""


def draw_all(report: dict[str, Any], folder: Path) -> list[tuple[str, str, str]]:
    """Draw what there is to draw; (section, file name without ending, what it shows) of each picture."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mm"  # else ids are drawn at random: equal results give equal files
    found = []
    if models := columns(report, "new_knowledge"):
        found.append(_save(_by_length(models, report), folder, "new_knowledge", "new-knowledge-by-length",
                           "Accuracy over the length of the prompt; dashed lines are trained contexts."))
        found.append(_save(_by_depth(models), folder, "new_knowledge", "new-knowledge-by-depth",
                           "Accuracy over the depth of the fact, at each model's greatest length."))
    if models := columns(report, "in_context"):
        found.append(_save(_by_shots(models), folder, "in_context", "in-context-by-shots",
                           "Accuracy over shots: lines are the best prompt form, bands its interval; dots are the mean of "
                           "the forms, the dotted line is chance."))
    models = [(name, [row for row in rows if row["percent"]]) for name, rows in columns(report, "persistent")]
    if any(rows for _, rows in models):
        found.append(_save(_bars(models), folder, "persistent", "persistent", "Score of each benchmark, percent."))
    return found


def _save(figure: Any, folder: Path, section: str, stem: str, what: str) -> tuple[str, str, str]:
    from matplotlib import pyplot

    for ending in ("png", "svg"):
        figure.savefig(folder / f"{stem}.{ending}", metadata={"Date": None} if ending == "svg" else None)
    pyplot.close(figure)
    return section, stem, what


def _panels(count: int) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, two in a row."""
    from matplotlib import pyplot

    across = min(2, count)
    down = (count + across - 1) // across
    figure, axes = pyplot.subplots(down, across, figsize=(WIDTH * across, 3.3 * down + 0.4), dpi=150, layout="constrained",
                                   squeeze=False)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.set_visible(False)
    for axis in flat[:count]:
        axis.grid(True, color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, flat[:count]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _legend(figure: Any, axis: Any) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _percent(axis: Any) -> None:
    axis.set_ylim(-3, 103)
    axis.set_ylabel("accuracy, %")


def _families(models: list[tuple[str, list[dict[str, Any]]]]) -> list[tuple[str, list[str]]]:
    measured = {row["task"] for _, rows in models for row in rows}
    families = (("question answering", QA_TASKS), ("needles in a haystack", NIAH_TASKS))
    return [(title, chosen) for title, tasks in families if (chosen := [task for task in tasks if task in measured])]


def _by_length(models: list[tuple[str, list[dict[str, Any]]]], report: dict[str, Any]) -> Any:
    families = _families(models)
    figure, axes = _panels(len(families))
    for axis, (title, tasks) in zip(axes, families, strict=True):
        for index, (name, rows) in enumerate(models):
            lengths = sorted({row["length"] for row in rows})
            axis.plot(lengths, [family_score(rows, tasks, length) for length in lengths], marker="o", markersize=3.5,
                      color=_colour(index), label=name)
        for trained in sorted({result["trained_context"] for result in report["results"]}):
            axis.axvline(trained, color="#888888", linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_xlabel("tokens of the prompt")
        axis.set_title(title, fontsize=10)
        _percent(axis)
    _legend(figure, axes[0])
    return figure


def _by_depth(models: list[tuple[str, list[dict[str, Any]]]]) -> Any:
    families = _families(models)
    figure, axes = _panels(len(families))
    for axis, (title, tasks) in zip(axes, families, strict=True):
        for index, (name, rows) in enumerate(models):
            longest = max(row["length"] for row in rows if row["task"] in tasks)
            scores = depth_scores(rows, tasks, longest)
            points = [(20 * part + 10, score) for part, score in enumerate(scores) if score is not None]
            axis.plot([depth for depth, _ in points], [score for _, score in points], marker="o", markersize=3.5,
                      color=_colour(index), label=f"{name}, {longest:,}")
        axis.set_xlim(0, 100)
        axis.set_xlabel("depth of the fact in the context, %")
        axis.set_title(title, fontsize=10)
        _percent(axis)
    _legend(figure, axes[0])
    return figure


def _by_shots(models: list[tuple[str, list[dict[str, Any]]]]) -> Any:
    panels = sorted({(row["task"], row["labels"]) for _, rows in models for row in rows})
    figure, axes = _panels(len(panels))
    for axis, (task, kind) in zip(axes, panels, strict=True):
        for index, (name, rows) in enumerate(models):
            mine = [row for row in rows if (row["task"], row["labels"]) == (task, kind)]
            mine.sort(key=lambda row: row["shots"])
            shots = [row["shots"] for row in mine]
            low, high = zip(*(row["best"]["interval"] for row in mine), strict=True) if mine else ((), ())
            best = [row["best"]["score"] for row in mine]
            axis.plot(shots, best, marker="o", markersize=3.5, color=_colour(index), label=name)
            axis.fill_between(shots, low, high, color=_colour(index), alpha=0.12, linewidth=0)
            axis.plot(shots, [row["mean"] for row in mine], linestyle="none", marker=".", markersize=4, color=_colour(index))
            if mine:
                axis.axhline(mine[0]["chance"], color="#888888", linestyle=":", linewidth=1)
        axis.set_xscale("symlog", base=2, linthresh=1)
        axis.set_xlim(left=-0.15 if 0 in {row["shots"] for _, rows in models for row in rows} else None)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.set_xlabel("shots (examples of every class)")
        axis.set_title(f"{task}, {kind} labels", fontsize=10)
        _percent(axis)
    _legend(figure, axes[0])
    return figure


def _bars(models: list[tuple[str, list[dict[str, Any]]]]) -> Any:
    tasks = list(dict.fromkeys(row["task"] for _, rows in models for row in rows))
    figure, (axis,) = _panels(1)
    figure.set_size_inches(max(WIDTH, 0.9 * len(tasks) + 2), 3.7)
    width = 0.8 / len(models)
    for index, (name, rows) in enumerate(models):
        scores = {row["task"]: row["score"] for row in rows}
        places = [place + (index - (len(models) - 1) / 2) * width for place in range(len(tasks))]
        axis.bar(places, [scores.get(task, 0) for task in tasks], width * 0.92, color=_colour(index), label=name)
    axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("score, %")
    _legend(figure, axis)
    return figure

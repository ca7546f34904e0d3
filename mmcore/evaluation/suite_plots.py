"""The results of the suites as pictures, each as PNG and SVG.

A checkpoint has one colour and one marker in all of them; with a memory removed its line is dashed and its marker hollow.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.evaluation.report import COLOURS
from mmcore.evaluation.suite_tables import (
    RESTS_ON,
    Models,
    columns,
    depth_scores,
    families,
    family_interval,
    family_score,
    labels,
)

WIDTH = 4.4
"""Inches of a panel."""
GREY = "#777777"
MARKERS = "os^Dvp"


@dataclass(frozen=True)
class Picture:
    """One that was drawn."""

    section: str
    stem: str
    """Of its files' names."""
    what: str
    """A caption."""
    tables: tuple[str, ...]
    """Keys of the tables that hold its numbers."""


def draw_all(report: dict[str, Any], folder: Path) -> list[Picture]:
    """Draw what there is to draw, in the order of a report."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mm"  # else ids are drawn at random: equal results give equal files
    styles = line_styles(report)
    found = []
    models = [(name, [row for row in rows if row["percent"]]) for name, rows in columns(report, "persistent")]
    if any(rows for _, rows in models):
        found.append((_by_benchmark(models, styles), Picture(
            "persistent", "persistent",
            "Score of each benchmark with its 95 % interval; a grey stroke is what guessing gives.", ("benchmarks",))))
    if models := columns(report, "new_knowledge"):
        shorts = ["qa" if title.startswith("question") else "needles" for title, _ in families(models)]
        found.append((_by_length(models, report, styles), Picture(
            "new_knowledge", "new-knowledge-by-length",
            "Accuracy over the length of the prompt, means over tasks with 95 % intervals. Shaded: beyond the trained "
            "context.", tuple(f"{short}-by-length" for short in shorts))))
        found.append((_by_depth(models), Picture(
            "new_knowledge", "new-knowledge-by-depth",
            "Accuracy in percent by where in the context the asked fact stands (top: at the beginning; bottom: next to the "
            "question) and by length.", tuple(f"{short}-by-depth" for short in shorts))))
    if models := columns(report, "in_context"):
        tasks = sorted({row["task"] for _, rows in models for row in rows})
        found.append((_by_shots(models, styles, tasks), Picture(
            "in_context", "in-context-by-shots",
            "Accuracy over shots: lines are the best prompt form with its 95 % interval, dots the mean of the forms, the "
            "dotted line is what guessing gives.", tuple(f"{task}-by-shots" for task in tasks))))
    for figure, picture in found:
        _save(figure, folder, picture.stem)
    return [picture for _, picture in found]


def line_styles(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each result's line looks like: matplotlib's settings by label."""
    checkpoints = list(dict.fromkeys(result["checkpoint"] for result in report["results"]))
    found = {}
    for name, result in zip(labels(report), report["results"], strict=True):
        number = checkpoints.index(result["checkpoint"])
        found[name] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5,
                       "linewidth": 1.6, "linestyle": "--" if result["without"] else "-",
                       "markerfacecolor": "white" if result["without"] else COLOURS[number % len(COLOURS)]}
    return found


def _save(figure: Any, folder: Path, stem: str) -> None:
    from matplotlib import pyplot

    for ending in ("png", "svg"):
        figure.savefig(folder / f"{stem}.{ending}", metadata={"Date": None} if ending == "svg" else None)
    pyplot.close(figure)


def _panels(down: int, across: int, width: float = WIDTH, height: float = 2.9) -> tuple[Any, list[list[Any]]]:
    """A figure of panels, rows of them."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(down, across, figsize=(width * across, height * down + 0.5), dpi=150,
                                   layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.grid(True, color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes.tolist()


def _legend(figure: Any, axis: Any) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _percent(axis: Any, top: float = 100.0) -> None:
    axis.set_ylim(-0.03 * top, 1.03 * top)
    axis.set_ylabel("accuracy, %", fontsize=8)


def _banded(
    axis: Any, places: list[float], scores: list[float], intervals: list[list[float]], style: dict[str, Any], name: str
) -> None:
    """A line in a band."""
    axis.plot(places, scores, label=name, **style)
    axis.fill_between(places, *zip(*intervals, strict=True), color=style["color"], alpha=0.1, linewidth=0)


def short_length(value: float) -> str:
    """4k for 4,096 tokens."""
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def _by_length(models: Models, report: dict[str, Any], styles: dict[str, dict]) -> Any:
    found = families(models)
    figure, (axes,) = _panels(1, len(found))
    for axis, (title, tasks) in zip(axes, found, strict=True):
        lengths = sorted({row["length"] for _, rows in models for row in rows})
        for name, rows in models:
            mine = [length for length in lengths if family_score(rows, tasks, length) is not None]
            _banded(axis, mine, [family_score(rows, tasks, length) for length in mine],
                    [family_interval(rows, tasks, length) for length in mine], styles[name], name)
        _mark_trained(axis, {result["trained_context"] for result in report["results"]}, lengths)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [short_length(length) for length in lengths])
        axis.minorticks_off()
        axis.set_xlabel("tokens of prompt and answer", fontsize=8)
        axis.set_title(title, fontsize=9)
        _percent(axis)
    _legend(figure, axes[0])
    return figure


def _mark_trained(axis: Any, trained: set[int], lengths: list[int]) -> None:
    """Shade what lies beyond the least trained context, and draw the contexts that lie among the lengths."""
    low, high = lengths[0] / 1.15, lengths[-1] * 1.15
    axis.set_xlim(low, high)
    if min(trained) < high:
        axis.axvspan(max(low, min(trained)), high, color="#f3f0e6", zorder=0, linewidth=0)
    for context in sorted(trained):
        if low < context < high:
            axis.axvline(context, color=GREY, linestyle=":", linewidth=1)


def _by_depth(models: Models) -> Any:
    """Heat maps: a row of panels for each family, a column for each model."""
    found = families(models)
    width = max(1.9, min(3.2, 8.8 / len(models)))
    figure, grid = _panels(len(found), len(models), width, 2.1)
    for axes, (title, tasks) in zip(grid, found, strict=True):
        for column, (axis, (name, rows)) in enumerate(zip(axes, models, strict=True)):
            lengths = sorted({row["length"] for row in rows if row["task"] in tasks})
            scores = [depth_scores(rows, tasks, length) for length in lengths]
            image = _heat(axis, [[part[fifth] for part in scores] for fifth in range(5)])
            axis.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
            axis.set_yticks(range(5), [f"{20 * part}-{20 * part + 20} %" for part in range(5)] if not column else [""] * 5)
            axis.tick_params(labelsize=7)
            if not column:
                axis.set_ylabel(title, fontsize=8)
            if axes is grid[0]:
                axis.set_title(_broken(name, 24), fontsize=8)
            if axes is grid[-1]:
                axis.set_xlabel("tokens", fontsize=8)
    figure.colorbar(image, ax=[axis for axes in grid for axis in axes], shrink=0.7, label="accuracy, %")
    return figure


def _heat(axis: Any, scores: list[list[float | None]]) -> Any:
    """A heat map of percents with its figures; cells without items stay empty."""
    axis.grid(False)
    image = axis.imshow([[float("nan") if value is None else value for value in line] for line in scores],
                        aspect="auto", cmap="Blues", vmin=0, vmax=100)
    for row, line in enumerate(scores):
        for column, value in enumerate(line):
            if value is not None:
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6.5,
                          color="white" if value > 55 else "#333333")
    return image


def _broken(name: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(name, width))


def _by_shots(models: Models, styles: dict[str, dict], tasks: list[str]) -> Any:
    """A row of panels for each task, a column for each kind of labels."""
    measured = {row["labels"] for _, rows in models for row in rows}
    kinds = [kind for kind in ("semantic", "anonymous") if kind in measured]
    figure, grid = _panels(len(tasks), len(kinds))
    for axes, task in zip(grid, tasks, strict=True):
        top = max(row["best"]["interval"][1] for _, rows in models for row in rows if row["task"] == task)
        for axis, kind in zip(axes, kinds, strict=True):
            counts: set[int] = set()
            for name, rows in models:
                mine = [row for row in rows if (row["task"], row["labels"]) == (task, kind)]
                if not mine:
                    continue
                mine.sort(key=lambda row: row["shots"])
                shots = [row["shots"] for row in mine]
                counts |= set(shots)
                _banded(axis, shots, [row["best"]["score"] for row in mine], [row["best"]["interval"] for row in mine],
                        styles[name], name)
                axis.plot(shots, [row["mean"] for row in mine], linestyle="none", marker=".", markersize=4,
                          color=styles[name]["color"])
                chance = mine[0]["chance"]
            axis.axhline(chance, color=GREY, linestyle=":", linewidth=1)
            axis.set_xscale("symlog", base=2, linthresh=1)
            axis.set_xticks(sorted(counts), [f"{count:,}" for count in sorted(counts)])
            axis.minorticks_off()
            axis.set_xlim(min(counts) - 0.15 if min(counts) < 2 else min(counts) / 1.15, max(counts) * 1.15)
            if axes is grid[-1]:
                axis.set_xlabel("shots (examples of every class)", fontsize=8)
            axis.set_title(f"{task}, {kind} labels", fontsize=9)
            _percent(axis, min(100.0, max(20.0, top)))
    _legend(figure, grid[0][0])
    return figure


def _by_benchmark(models: Models, styles: dict[str, dict]) -> Any:
    """Dots with their intervals, a line for each benchmark, groups apart."""
    tasks = list(dict.fromkeys((row["group"], row["task"]) for _, rows in models for row in rows))
    order = list(RESTS_ON)
    tasks.sort(key=lambda pair: order.index(pair[0]))
    places, place, group = {}, 0.0, tasks[0][0]
    for task in tasks:
        place += 1.0 if task[0] == group else 1.6
        group = task[0]
        places[task] = place
    figure, ((axis,),) = _panels(1, 1, 7.0, 0.9 + 0.34 * place)
    step = 0.6 / max(1, len(models))
    for index, (name, rows) in enumerate(models):
        heights = [places[row["group"], row["task"]] + (index - (len(models) - 1) / 2) * step for row in rows]
        spread = [[row["score"] - row["interval"][0] for row in rows], [row["interval"][1] - row["score"] for row in rows]]
        axis.errorbar([row["score"] for row in rows], heights, xerr=spread, label=name, elinewidth=1,
                      **styles[name] | {"linestyle": "none"})
        for row in rows:
            if row["chance"] is not None:
                middle = places[row["group"], row["task"]]
                axis.plot([row["chance"]] * 2, [middle - 0.4, middle + 0.4], color="#aaaaaa", linewidth=2.5, zorder=1,
                          solid_capstyle="butt")
    axis.set_yticks(list(places.values()), [task for _, task in places])
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.set_xlim(-3, 103)
    axis.set_xlabel("score, %", fontsize=8)
    _legend(figure, axis)
    return figure

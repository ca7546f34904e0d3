"""The claims as pictures, SVG and PNG: lines are means over seeds, bands reach from the least to the greatest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcore.claims.plan import (
    FIXED_BANDWIDTH,
    FIXED_DELAY,
    LONG_SHORT,
    MOSAIC,
    NO_GATES,
    PATIENT,
    TASKS,
    TRANSFORMER,
)
from mmcore.evaluation.report import COLOURS

ORDER = (MOSAIC, TRANSFORMER, LONG_SHORT, FIXED_DELAY, FIXED_BANDWIDTH, NO_GATES, PATIENT)
"""A model has its colour in every figure."""
_COLOURS = (*COLOURS, "#e08a1e")

Found = Sequence[Mapping[str, Any]]


def draw_all(runs: Mapping[str, Mapping[str, Found]], folder: Path) -> None:
    """Write every figure into `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    bare = {"axes.spines.top": False, "axes.spines.right": False}
    matplotlib.rcParams.update({"svg.hashsalt": "mm", "font.size": 9, **bare})
    _text(runs["text"], folder)
    _recall(runs["recall"], folder)
    classes, automaton = TASKS["classes"].language, TASKS["automata"].language
    _shots(runs["classes"], "classes", "shots", 1 / classes.classes, classes.shots, folder)
    _shots(runs["automata"], "automata", "strings", automaton.edges / automaton.symbols, automaton.strings, folder)
    _tuning(runs["recall"], folder)
    _ablations(runs, folder)


def _text(text: Mapping[str, Found], folder: Path) -> None:
    figure, (axis,) = _panels(1)
    for model, found in text.items():
        steps = [point["step"] for point in found[0]["curve"]]
        _band(axis, model, steps, [[point["loss"] for point in run["curve"]] for run in found])
    axis.set(xlabel="training steps", ylabel="held-out loss, nats a token")
    _finish(figure, axis, folder, "text")


def _recall(recall: Mapping[str, Found], folder: Path) -> None:
    figure, (over_size, over_steps) = _panels(2)
    task = TASKS["recall"]
    for model in (MOSAIC, FIXED_DELAY, TRANSFORMER, LONG_SHORT):
        _band(over_size, model, task.sizes, [_by(run["accuracy"], task.sizes) for run in recall[model]])
        steps = [point["step"] for point in recall[model][0]["curve"]]
        _band(over_steps, model, steps, [[point["accuracy"] for point in run["curve"]] for run in recall[model]])
    over_size.axvline(task.trained_size, color="#888888", linestyle="--", linewidth=1)
    _log(over_size, task.sizes)
    over_size.set(xlabel="facts in the context (dashed: trained)", ylabel="questions answered right")
    over_steps.set_xscale("log")
    over_steps.set(xlabel="training steps", title=f"at {task.trained_size} facts")
    _finish(figure, over_size, folder, "recall")


def _shots(found: Mapping[str, Found], name: str, word: str, chance: float, trained: int, folder: Path) -> None:
    figure, (axis,) = _panels(1)
    sizes = TASKS[name].sizes
    for model in (MOSAIC, TRANSFORMER, PATIENT):
        _band(axis, model, sizes, [_by(run["accuracy"], sizes) for run in found[model]])
    axis.axhline(chance, color="#888888", linestyle=":", linewidth=1)
    axis.axvline(trained, color="#888888", linestyle="--", linewidth=1)
    _log(axis, sizes)
    axis.set(xlabel=f"{word} (dashed: trained; dotted: chance)", ylabel="accuracy", ylim=(0, 1.02))
    _finish(figure, axis, folder, name)


def _tuning(recall: Mapping[str, Found], folder: Path) -> None:
    figure, (axis,) = _panels(1)
    task = TASKS["recall"]
    for model in (MOSAIC, FIXED_DELAY, TRANSFORMER, LONG_SHORT):
        _band(axis, model, task.tuned_steps, [_by(run["tuned"], task.tuned_steps) for run in recall[model]])
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_xticks(task.tuned_steps, [str(step) for step in task.tuned_steps])
    size = task.trained_size * task.tuned_factor
    axis.set(xlabel="steps of fine-tuning", ylabel=f"right at {size} facts", ylim=(-0.02, 1.02))
    _finish(figure, axis, folder, "tuning")


def _ablations(runs: Mapping[str, Mapping[str, Found]], folder: Path) -> None:
    figure, axes = _panels(2)
    for axis, name, word in zip(axes, ("recall", "classes"), ("facts in the context", "shots"), strict=True):
        sizes = TASKS[name].sizes
        for model in (MOSAIC, FIXED_BANDWIDTH, NO_GATES, TRANSFORMER, LONG_SHORT):
            if model in runs[name]:
                _band(axis, model, sizes, [_by(run["accuracy"], sizes) for run in runs[name][model]])
        _log(axis, sizes)
        axis.set(xlabel=word, ylabel="accuracy", ylim=(-0.02, 1.02))
    _finish(figure, axes[0], folder, "ablations")


def _by(values: Mapping[Any, float], keys: Sequence[int]) -> list[float]:
    """Values in the order of `keys`, which JSON may have made strings."""
    return [values.get(key, values.get(str(key))) for key in keys]


def _panels(count: int) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(4.4 * count, 3.4), dpi=150, layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(True, color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[0]


def _band(axis: Any, model: str, x: Sequence[float], rows: Sequence[Sequence[float]]) -> None:
    colour = _COLOURS[ORDER.index(model)]
    columns = list(zip(*rows, strict=True))
    line = "--" if model.startswith(f"{MOSAIC},") else "-"  # ablations often lie upon the mosaic
    means = [sum(column) / len(column) for column in columns]
    axis.plot(x, means, line, marker="o", markersize=3.5, color=colour, label=model)
    axis.fill_between(x, [min(column) for column in columns], [max(column) for column in columns], color=colour, alpha=0.15,
                      linewidth=0)


def _log(axis: Any, sizes: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()


def _finish(figure: Any, axis: Any, folder: Path, stem: str) -> None:
    from matplotlib import pyplot

    handles, labels = axis.get_legend_handles_labels()
    across = 3 if len(figure.axes) > 1 else 2
    figure.legend(handles, labels, loc="outside upper center", ncols=across, frameon=False)
    for ending in ("svg", "png"):
        figure.savefig(folder / f"{stem}.{ending}", metadata={"Date": None} if ending == "svg" else None)
    pyplot.close(figure)

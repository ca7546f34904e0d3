"""Results as files: results.json, results.md, by-position.png and .svg."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmcore.errors import ConfigError
from mmcore.evaluation.folders import drafted, require_writable, strict_json

COLOURS = ("#1f6fb4", "#c8452f", "#2f8a57", "#8458b3", "#b8860b", "#555555")
RESULTS = "results.json"
PICTURES = ("by-position.png", "by-position.svg")
FILES = (RESULTS, "results.md", *PICTURES)


def check_folder(folder: str | Path) -> Path:
    """The folder, if a report may be written there: none yet, an empty one, or one of an earlier report and nothing else.

    Raises ConfigError where something else is in it, HardwareError where it cannot be written; better before the
    measurement than after it.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and _holds_own_files(folder)):
        raise ConfigError(f"{folder} exists and holds other things than an earlier report: give --out a new folder")
    require_writable(folder)
    return folder


def _holds_own_files(folder: Path) -> bool:
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}  # such as what a killed mm left
    if RESULTS not in found:
        return not found
    try:
        values = json.loads((folder / RESULTS).read_bytes())
    except (OSError, ValueError):
        return False
    return found <= set(FILES) and isinstance(values, dict) and {"text", "results", "notes"} <= values.keys()


def write_results(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write a report's files, in place of those of an earlier one. Returns their paths.

    Raises ConfigError as check_folder does, HardwareError where the disk refuses; nothing is left half-written.
    """
    folder = check_folder(folder)
    with drafted(folder, last=RESULTS) as draft:
        (draft / RESULTS).write_text(strict_json(report) + "\n", encoding="utf-8")
        (draft / "results.md").write_text(markdown(report), encoding="utf-8")
        if any(result.get("by_position") for result in report["results"]):
            plot(report, [draft / name for name in PICTURES])
        names = sorted(path.name for path in draft.iterdir())
        for name in set(PICTURES) - set(names):
            (folder / name).unlink(missing_ok=True)
    return [folder / name for name in names]


def names(report: dict[str, Any]) -> list[str]:
    """A short name for each result: the last parts of its path that tell it from the others."""
    paths = [Path(result["checkpoint"]).absolute().parts for result in report["results"]]
    length = next(n for n in range(1, max(map(len, paths)) + 1)
                  if len({path[-n:] for path in paths}) == len(set(paths)))
    return ["/".join(path[-length:]) for path in paths]


def summary_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of losses, compressors last; what was removed where anything was."""
    header = ["", "nats a token", "perplexity", "bits per byte", "tokens"]
    rows = []
    for name, result in zip(names(report), report["results"], strict=True):
        loss = with_error(result["loss"], result["standard_error"])
        rows.append([name, loss, f"{result['perplexity']:,.2f}", f"{result['bits_per_byte']:.4f}", f"{result['tokens']:,}"])
    for name, bits in report.get("compressors", {}).items():
        rows.append([name, "-", "-", f"{bits:.4f}", "-"])
    removed = [", ".join(result["without"]) for result in report["results"]]
    if any(removed):
        header.append("without")
        for index, row in enumerate(rows):
            row.append(removed[index] if index < len(removed) and removed[index] else "-")
    return header, rows


def position_rows(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of losses by position; one row for each range that any result has."""
    chosen = [(name, result["by_position"], result["trained_context"])
              for name, result in zip(names(report), report["results"], strict=True) if result.get("by_position")]
    spans = sorted({(part["first"], part["last"]) for _, found, _ in chosen for part in found["bins"]})
    header = ["tokens read before", "times trained", *(name for name, _, _ in chosen)]
    rows = []
    trained = {context for _, _, context in chosen}
    for first, last in spans:
        # With unequal trained contexts the ratio is not one number.
        times = f"{last / next(iter(trained)):.3g}" if len(trained) == 1 else "-"
        row = [f"{first:,} - {last:,}" if last > first else f"{first:,}", times]
        for _, found, _ in chosen:
            part = next((b for b in found["bins"] if (b["first"], b["last"]) == (first, last)), None)
            row.append(with_error(part["loss"], part["standard_error"]) if part else "-")
        rows.append(row)
    return header, rows


def with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def markdown(report: dict[str, Any]) -> str:
    """The report as a page of text."""
    text = report["text"]
    lines = [f"# Evaluation on {text['name']}", "", f"{text['documents']:,} documents, {text['bytes']:,} bytes.", ""]
    lines += _markdown_table(*summary_rows(report))
    lines += ["", *policy(report)]
    header, rows = position_rows(report)
    if rows:
        lines += ["", "## Loss by position (nats a token)", "", *_markdown_table(header, rows), "",
                  "![Loss by position](by-position.png)"]
    if report["notes"]:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report["notes"])]
    return "\n".join(lines) + "\n"


def policy(report: dict[str, Any]) -> list[str]:
    """How the figures of a report came about, in sentences; of each result where they differ."""
    results = report["results"]
    lines = _alike(report, [(result["context"], result["stride"]) for result in results], _windows)
    if len({result["context"] for result in results}) > 1:
        least = min(result["context"] for result in results)
        lines.append(f"What is predicted from less text has a higher loss: --context {least} reads all in windows alike.")
    positions = [result.get("by_position") for result in results]
    return lines + _alike(report, [found and (found["sequences"], found["longest"], found["concatenated"])
                                   for found in positions], _sequences)  # fmt: skip


def _alike(report: dict[str, Any], facts: list[Any], say: Callable[..., str]) -> list[str]:
    """What `say` says of facts, once where all have the same; None has nothing to say."""
    if len(set(facts)) == 1:
        return [say(*facts[0])] if facts[0] else []
    return [f"{name}: {say(*fact)}" for name, fact in zip(names(report), facts, strict=True) if fact]


def _windows(context: int, stride: int) -> str:
    return (f"Every token is scored once, in windows of {context:,} tokens that advance by {stride:,}: past a document's "
            f"first window it is predicted from {context - stride + 1:,} to {context:,} tokens.")  # fmt: skip


def _sequences(count: int, longest: int, joined: bool) -> str:
    what = "joined documents" if joined else "documents long enough"
    return f"By position: {count:,} sequences of {longest:,} tokens from {what}, each read whole from an empty memory."


def _markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def plot(report: dict[str, Any], paths: list[Path]) -> None:
    """Loss over position on a logarithmic axis, a line for each result, the trained context marked."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mm"  # else ids are drawn at random: equal results give equal files
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    contexts: dict[int, list[str]] = {}
    for index, (name, result) in enumerate(zip(names(report), report["results"], strict=True)):
        if result.get("by_position"):
            contexts.setdefault(result["trained_context"], []).append(name)
            _draw_line(axes, result, name, COLOURS[index % len(COLOURS)])
    for context, owners in contexts.items():
        label = "trained context" if len(contexts) == 1 else f"trained context of {', '.join(owners)}"
        axes.axvline(context, color="#888888", linestyle="--", linewidth=1)
        axes.annotate(
            f"{label}, {context:,}", (context, 1), xycoords=("data", "axes fraction"), xytext=(-4, -4),
            textcoords="offset points", rotation=90, ha="right", va="top", fontsize=8, color="#666666",
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    drawn = [result["by_position"]["bins"] for result in report["results"] if result.get("by_position")]
    axes.set_xlim(0.8, 1.2 * max(bins[-1]["last"] for bins in drawn))
    banded = any(bins[0]["standard_error"] is not None for bins in drawn)
    axes.set_xlabel("tokens read before the predicted one" + (" (band: ± one standard error)" if banded else ""))
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(f"Loss by position: {_shorten(report['text']['name'])}", fontsize=10)
    axes.grid(True, color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)  # a line may be anywhere inside
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _draw_line(axes: Any, result: dict[str, Any], name: str, colour: str) -> None:
    bins = result["by_position"]["bins"]
    # The geometric middle of a bin is its place on a logarithmic axis.
    places = [(part["first"] * part["last"]) ** 0.5 for part in bins]
    losses = [part["loss"] for part in bins]
    removed = f" without {', '.join(result['without'])}" if result["without"] else ""
    axes.plot(places, losses, color=colour, linewidth=1.8, marker="o", markersize=3, label=name + removed)
    if all(part["standard_error"] is not None for part in bins):
        low, high = ([part["loss"] + sign * part["standard_error"] for part in bins] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def _shorten(name: str, most: int = 70) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."

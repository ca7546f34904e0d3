"""Numbers over seeds as words and tables of Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

Found = Sequence[Mapping[str, Any]]
"""Results of one model on one task, a seed each."""


def at(found: Found, size: int, key: str = "accuracy") -> list[float]:
    """A measure of every seed at one size; JSON has made strings of sizes."""
    return [run[key].get(size, run[key].get(str(size))) for run in found]


def mean_at(found: Found, size: int, key: str = "accuracy") -> float:
    return statistics.fmean(at(found, size, key))


def mean(found: Found, key: str) -> float:
    return statistics.fmean(run[key] for run in found)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`mean (least-greatest)` over seeds."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_size(
    found: Mapping[str, Found], models: Sequence[str], sizes: Sequence[int], word: str, key: str = "accuracy"
) -> str:
    """A row a model, a column a size."""
    rows = [[model, *(spread(at(found[model], size, key)) for size in sizes)] for model in models]
    return table(["model", *(f"{size} {word}" for size in sizes)], rows)


def paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)


def section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *parts])

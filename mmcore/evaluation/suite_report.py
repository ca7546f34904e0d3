"""A result folder of the suites: results.json, results.md, plots, and report.html, which needs nothing outside itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmcore.errors import HardwareError
from mmcore.evaluation import suite_plots
from mmcore.evaluation.journal import NAME as ITEMS
from mmcore.evaluation.suite_tables import TITLES, labels, tables

INTRODUCTIONS = {
    "persistent": "What the weights know: common benchmarks, answered without a text to look things up in.",
    "new_knowledge": "What can be stored and found in the context: long texts with facts in them, a question last "
                     "(RULER's tasks). An answer is right that contains the reference.",
    "in_context": "What can be learnt from examples: the label of a text after n examples of every class. The likeliest "
                  "label is taken, scored with all its tokens and what ends it; anonymous labels (class_00 ...) mean "
                  "nothing, so that only the examples can teach them.",
}


def write(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write a report's files beside its items; each is whole or as it was, results.json last. Returns their paths.

    Raises HardwareError where the disk refuses.
    """
    with drafted(folder, last="results.json") as draft:
        pictures = suite_plots.draw_all(report, draft)
        (draft / "results.md").write_text(markdown(report, pictures), encoding="utf-8")
        (draft / "report.html").write_text(page(report, pictures, draft), encoding="utf-8")
        (draft / "results.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        names = sorted(path.name for path in draft.iterdir())
    return [Path(folder) / name for name in (*names, ITEMS)]


@contextlib.contextmanager
def drafted(folder: str | Path, last: str) -> Iterator[Path]:
    """A folder for files that move into `folder` when the block ends well, each in one step, `last` after all others.

    Raises HardwareError where the disk refuses.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as name:
            yield Path(name)
            for path in sorted(Path(name).iterdir(), key=lambda path: (path.name == last, path.name)):
                os.replace(path, folder / path.name)
    except OSError as error:
        raise HardwareError(f"{folder} cannot be written ({error.strerror}): give --out another folder") from error


def summary(report: dict[str, Any]) -> str:
    """What was measured, in a sentence."""
    limit = report["settings"]["limit"]
    items = f"at most {limit:,} items" if limit else "all items (at most 500 where a task has no end)"
    return (f"{', '.join(TITLES[suite.replace('-', '_')].lower() for suite in report['suites'])}; {items} of each task and "
            f"setting; seed {report['settings']['seed']}; {report['settings']['device']}.").capitalize()


def markdown(report: dict[str, Any], pictures: list[tuple[str, str, str]]) -> str:
    """The report as a page of text."""
    lines = [f"# Evaluation of {', '.join(labels(report))}", "", summary(report), ""]
    lines += [f"- {note}." for note in report["notes"]]
    all_tables = tables(report)
    for section, title in TITLES.items():
        mine = [table for table in all_tables if table.section == section]
        if mine:
            lines += ["", f"## {title}", "", INTRODUCTIONS[section]]
            lines += [f"\n![{what}]({stem}.png)" for where, stem, what in pictures if where == section]
        for table in mine:
            rule = ["---"] + ["---:"] * (len(table.header) - 1)
            lines += ["", f"### {table.title}", ""]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
                      for row in (table.header, rule, *table.rows)]
            lines += ["", table.note] if table.note else []
    return "\n".join(lines) + "\n"


def page(report: dict[str, Any], pictures: list[tuple[str, str, str]], folder: Path) -> str:
    """report.html: pictures inside, no script, nothing loaded from anywhere."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = (Path(__file__).parent / "templates" / "suites.html.j2").read_text(encoding="utf-8")
    names = labels(report)
    sections = [(section, title) for section, title in TITLES.items()
                if any(result.get(section) for result in report["results"])]
    plots = [{"section": section, "what": what, "data": base64.b64encode((folder / f"{stem}.svg").read_bytes()).decode()}
             for section, stem, what in pictures]
    models = [[name, result["model_type"], f"{result['parameters']:,}", f"{result['trained_context']:,}",
               result["sha256"][:16]] for name, result in zip(names, report["results"], strict=True)]
    return environment.from_string(source).render(
        names=names, summary=summary(report), notes=report["notes"], sections=sections, introductions=INTRODUCTIONS,
        plots=plots, tables=tables(report), examples=_examples(report), models=models, data=report["data"],
        settings=json.dumps(report["settings"]), versions=json.dumps(report["versions"]),
    )


def _examples(report: dict[str, Any]) -> list[dict[str, str]]:
    """One beginning of a prompt for each in-context task and kind of labels."""
    found = {}
    for result in report["results"]:
        for row in result.get("in_context", []):
            title = f"The beginning of a prompt of {row['task']} with {row['labels']} labels"
            found.setdefault(title, {"section": "in_context", "title": title, "text": row["example"]})
    return list(found.values())

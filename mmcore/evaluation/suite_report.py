"""A result folder of the suites: results.json, results.md, plots, and report.html, which needs nothing outside itself."""

from __future__ import annotations

import base64
import shlex
from pathlib import Path
from typing import Any

from mmcore.evaluation import suite_plots
from mmcore.evaluation.folders import drafted, strict_json
from mmcore.evaluation.journal import NAME as ITEMS
from mmcore.evaluation.suite_plots import Picture
from mmcore.evaluation.suite_tables import TITLES, Cell, Table, labels, tables

INTRODUCTIONS = {
    "glance": "Three measurements of each model: what its weights know, what it finds in its context, and what it learns "
              "from examples there.",
    "persistent": "What the weights know: common benchmarks, answered without a text to look things up in.",
    "new_knowledge": "What can be stored and found in the context: long texts with facts in them, a question last "
                     "(RULER's tasks). An answer is right that contains the reference.",
    "in_context": "What can be learnt from examples: the label of a text after n examples of every class. The likeliest "
                  "label is taken, scored with all its tokens and what ends it; anonymous labels (class_00 ...) mean "
                  "nothing, so that only the examples can teach them.",
}
METHODS = {
    "Benchmarks": "lm-evaluation-harness calls the model in its own process. A multiple choice is scored by the likelihood "
                  "of each answer (acc), or of it for its length in characters (acc_norm); every text is a document of its "
                  "own that begins with the begin token.",
    "New knowledge": "Prompts are built as RULER's (qa_1 is SQuAD, qa_2 HotpotQA, niah needles in a haystack), with a seed "
                     "of its own for each question, so that the paragraph that answers it may stand anywhere. A length "
                     "counts the prompt's tokens, by the model's tokenizer, and those of the answer (32, or 128 for "
                     "needles), which is written greedily, until it holds every reference.",
    "In-context learning": "One shot is one example of every class; fewer shots are the first of more. Every number of "
                           "shots is tried with newlines and with spaces between the parts, and with the examples of a "
                           "shot in the order of their classes or shuffled: four prompt forms.",
    "Intervals": "Wilson's, at 95 %, over items. They say how sure a score is with these items for this model; another seed "
                 "of training would move it further.",
}


def write(report: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write a report's files beside its items; each is whole or as it was, results.json last. Returns their paths.

    Raises HardwareError where the disk refuses.
    """
    with drafted(folder, last="results.json") as draft:
        pictures = suite_plots.draw_all(report, draft)
        (draft / "results.md").write_text(markdown(report, pictures), encoding="utf-8")
        (draft / "report.html").write_text(page(report, pictures, draft), encoding="utf-8")
        (draft / "results.json").write_text(strict_json(report) + "\n", encoding="utf-8")
        names = sorted(path.name for path in draft.iterdir())
    return [Path(folder) / name for name in (*names, ITEMS)]


def summary(report: dict[str, Any]) -> str:
    """What was measured, in a sentence."""
    limit = report["settings"]["limit"]
    items = f"at most {limit:,} items" if limit else "all items (at most 500 where a task has no end)"
    settings = report["settings"]
    return (f"{', '.join(TITLES[suite.replace('-', '_')].lower() for suite in report['suites'])}; {items} of each task and "
            f"setting; seed {settings['seed']}; {settings['dtype']} on {settings['device']}.").capitalize()


def subjects(report: dict[str, Any]) -> str:
    """The checkpoints' names."""
    named = zip(labels(report), report["results"], strict=True)
    return " and ".join(name for name, result in named if not result["without"])


def command(report: dict[str, Any]) -> str:
    """The command that measures this again."""
    given, settings = report["given"], report["settings"]
    parts = ["mm", "eval", *given["checkpoints"]]
    parts += [word for suite in report["suites"] for word in ("--suite", suite)]
    parts += [word for path in given["data"] for word in ("--data", path)]
    parts += [word for memory in settings["without"] for word in ("--without", memory)]
    for name in ("limit", "seed", "device", "dtype", "tokenizer"):
        if settings[name] is not None:
            parts += [f"--{name}", str(settings[name])]
    for name in ("tasks", "lengths", "shots"):
        if settings[name]:
            parts += [f"--{name}", ",".join(map(str, settings[name]))]
    parts += [f"--{name.replace('_', '-')}" for name in ("ruler_exact", "online") if settings[name]]
    return shlex.join(parts)


def markdown(report: dict[str, Any], pictures: list[Picture]) -> str:
    """The report as a page of text."""
    lines = [f"# Evaluation of {subjects(report)}", "", summary(report), ""]
    lines += [f"- {note}." for note in report["notes"]]
    all_tables = tables(report)
    for section, title in TITLES.items():
        mine = [table for table in all_tables if table.section == section]
        if mine:
            lines += ["", f"## {title}", "", INTRODUCTIONS[section]]
            lines += [f"\n![{picture.what}]({picture.stem}.png)" for picture in pictures if picture.section == section]
        for table in mine:
            rule = ["---"] * table.words + ["---:"] * (len(table.header) - table.words)
            lines += ["", f"### {table.title}", ""]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
                      for row in (table.header, rule, *([_marked(cell) for cell in line] for line in table.rows))]
            lines += ["", table.note] if table.note else []
    lines += ["", "## How it was measured", "", *(f"- **{name}**: {text}" for name, text in METHODS.items()), "",
              "```", command(report), "```"]
    return "\n".join(lines) + "\n"


def _marked(cell: Cell) -> str:
    return f"**{cell.text}** {cell.below}".strip() if cell.best else str(cell)


def page(report: dict[str, Any], pictures: list[Picture], folder: Path) -> str:
    """report.html: pictures inside, no script, nothing loaded from anywhere."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = (Path(__file__).parent / "templates" / "suites.html.j2").read_text(encoding="utf-8")
    all_tables = tables(report)
    filled = {table.section for table in all_tables}
    sections = [(section, title) for section, title in TITLES.items() if section in filled]
    numbers = {table.key: number for number, table in enumerate(all_tables, start=1)}
    plots = [{"section": picture.section, "what": picture.what, "tables": picture.tables, "number": number,
              "data": base64.b64encode((folder / f"{picture.stem}.svg").read_bytes()).decode()}
             for number, picture in enumerate(pictures, start=1)]
    shown = [{"section": table.section, "key": table.key, "title": table.title, "header": table.header, "words": table.words,
              "note": table.note, "rows": merged(table),
              "plots": [plot["number"] for plot in plots if table.key in plot["tables"]]} for table in all_tables]
    models = [(name, result) for name, result in zip(labels(report), report["results"], strict=True)]
    return environment.from_string(source).render(
        names=subjects(report), summary=summary(report), notes=report["notes"], sections=sections,
        introductions=INTRODUCTIONS, plots=plots, tables=shown, numbers=numbers, examples=_examples(report), models=models,
        data=report["data"], versions=report["versions"], methods=METHODS, command=command(report),
        finished=report["finished"],
    )


def merged(table: Table) -> list[list[tuple[Cell, int]]]:
    """The rows as (cell, how many rows it spans): of equal neighbours in a column of groups only the first is left."""
    rows: list[list[tuple[Cell, int]]] = []
    for number, line in enumerate(table.rows):
        cells = []
        for column, cell in enumerate(line):
            if column >= table.groups:
                cells.append((cell, 1))
                continue
            alike = [other[: column + 1] == line[: column + 1] for other in table.rows]
            if number and alike[number - 1]:
                continue
            end = next((i for i in range(number, len(alike)) if not alike[i]), len(alike))
            cells.append((cell, end - number))
        rows.append(cells)
    return rows


def _examples(report: dict[str, Any]) -> list[dict[str, str]]:
    """One beginning of a prompt for each in-context task and kind of labels."""
    found = {}
    for result in report["results"]:
        for row in result.get("in_context", []):
            title = f"The beginning of a prompt of {row['task']} with {row['labels']} labels"
            found.setdefault(title, {"section": "in_context", "title": title, "text": row["example"]})
    return list(found.values())

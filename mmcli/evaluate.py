"""`mm eval`: loss, perplexity, bits per byte, and the loss by position; the paper's suites; what a model's heads read."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="CKPT...", help="Run folders, training checkpoints or exported folders."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Text to measure on (file or folder); may be repeated. "
                     "Without it: the documents that the first run held out. With --suite: folders and files of data."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", metavar="SUITE", help="persistent, new-knowledge, in-context or all; may be repeated."),
    ] = None,
    inspect: Annotated[
        Path | None, typer.Option("--inspect", metavar="FILE", help="Show what each head reads at a token of this text.")
    ] = None,
    token: Annotated[
        int, typer.Option("--token", help="With --inspect: the token, 0 is the begin token, -1 the last.")
    ] = -1,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="MEMORY", help="Read long_term, short_term, contextual (v1) or persistent as "
                     "empty; may be repeated."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of a window. Default: the trained context.")
    ] = None,
    stride: Annotated[int | None, typer.Option("--stride", help="Tokens between windows. Default: half of one.")] = None,
    longest: Annotated[
        int | None, typer.Option("--longest", help="Last position of the loss by position; 0 leaves it out. "
                                 "Default: 8 times the trained context.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", help="At most so many tokens for each measurement; 0: all.")
    ] = 1_000_000,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Windows in one forward pass.")] = None,
    compressors: Annotated[
        bool, typer.Option("--compressors", help="Show gzip -9 and xz -9 on the same text.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer's file or folder, for checkpoints "
                                 "without one. Default: each checkpoint's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Suites: items of each task and setting.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="NAMES", help="Suites: only these, such as qa_1,banking77.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="New knowledge: tokens of the prompts, such as 1k,4k,128k. "
                                 "Default: 1, 2, 4 and 8 times the trained context.")
    ] = None,
    shots: Annotated[str, typer.Option("--shots", help="In context: examples of every class.")] = "1,2,4,8",
    seed: Annotated[int, typer.Option("--seed", help="Suites: of every draw.")] = 0,
    ruler_exact: Annotated[
        bool, typer.Option("--ruler-exact", help="New knowledge: build qa prompts as RULER published them, flaws included.")
    ] = False,
    online: Annotated[
        bool, typer.Option("--online", help="Persistent: let the harness load data that are not in --data.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results. Default: eval-<time> in the run; for suites "
                                  "eval-suite-<hash of what is asked>, where an interrupted one goes on.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(
        metavar="FORMAT", help="Format of the weights: float32, bfloat16, float16, int8. Not with suites.",
        show_default=False,
    )] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte on text, and the loss by token position far past the trained context.

    Results are shown and written to a folder: results.json, results.md and a plot as PNG and SVG.

    \b
    Example:
      mm eval runs/quickstart --compressors
      mm eval runs/stories runs/stories-transformer --data book.txt
      mm eval runs/stories --data book.txt --without long_term
      mm eval runs/a runs/b --suite all --without long_term --data data/ --limit 100
      mm eval runs/stories --suite in-context --data my-labels.csv --shots 1,2,4
      mm eval runs/stories --inspect story.txt --token -1
    """
    if suite or inspect:
        _other(checkpoints, suite, inspect, token, data, without, out, device, as_json, {
            "limit": limit, "tasks": tasks, "lengths": lengths, "shots": shots, "seed": seed,
            "ruler_exact": ruler_exact, "online": online,
        })
        return
    from mmcore.evaluation import report as reports
    from mmcore.evaluation.runner import Settings
    from mmcore.evaluation.runner import evaluate as measure
    from mmcore.evaluation.text import held_out_text, read_files

    settings = Settings(
        context=context, stride=stride, max_tokens=max_tokens or None, batch_size=batch_size, longest=longest,
        without=tuple(without or ()), compressors=compressors, device=device, tokenizer=tokenizer, dtype=dtype,
    )
    folder = reports.check_folder(out or reports.default_folder(checkpoints[0]))
    text = read_files(data) if data else held_out_text(checkpoints[0])
    with _progress() as progress:
        report = measure(checkpoints, text, settings, progress)
    reports.write_results(report, folder)
    if as_json:
        print(json.dumps(report | {"folder": str(folder)}, indent=2))
        return
    _show(report)
    print(f"Results and plot: {folder}")
    print(f"Next: mm chat {shlex.quote(str(checkpoints[0]))}")


def _other(
    checkpoints: list[Path], suite: list[str] | None, inspect: Path | None, token: int, data: list[Path] | None,
    without: list[str] | None, out: Path | None, device: str, as_json: bool, options: dict[str, Any],
) -> None:
    """The suites, or the inspection."""
    from mmcli import evaluate_suites
    from mmcore.errors import ConfigError

    if inspect and (suite or len(checkpoints) > 1):
        raise ConfigError("--inspect looks at one text in one checkpoint: give it one, and no --suite")
    if inspect:
        evaluate_suites.run_inspection(checkpoints[0], inspect, token, without or (), device, out, as_json)
        return
    options |= {"without": tuple(without or ()), "device": device}
    evaluate_suites.run_suites(checkpoints, suite or (), data or (), options, out, as_json)


def _show(report: dict[str, Any]) -> None:
    """The tables, the sentences that say how they came about, and the notes."""
    from rich.console import Console

    from mmcore.evaluation import report as reports

    console = Console(highlight=False, markup=False)
    text = report["text"]
    title = f"{text['name']}: {text['documents']:,} documents, {text['bytes']:,} bytes"
    console.print(_table(title, *reports.summary_rows(report)))
    header, rows = reports.position_rows(report)
    if rows:
        console.print(_table("Loss by position, nats a token", header, rows))
    for sentence in (*reports.policy(report["results"][0]), *(f"Note: {note}." for note in report["notes"])):
        console.print(sentence, soft_wrap=True)


def _table(title: str, header: list[str], rows: list[list[str]]):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(header):
        # Figures are never broken over two lines; a long name is.
        table.add_column(Text(name), justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """callback(stage, tokens read, tokens to read) that shows speed and time left on standard error: a bar, or a
    plain line every 30 s where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield _plain_progress(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, rate="")
            speed = bars.tasks[bars.task_ids.index(tasks[stage])].speed
            bars.update(tasks[stage], completed=done, rate=f"{speed:,.0f} tokens/s" if speed else "")

        yield progress


def _plain_progress(console: Any, every: float = 30.0):
    """The callback for logs; `every` in seconds."""
    begun: dict[str, float] = {}
    shown = time.monotonic()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        start = begun.setdefault(stage, now)
        if now - shown < every or now == start:
            return
        shown = now
        speed = done / (now - start)
        left = (total - done) / speed
        console.print(f"{stage}: {done:,} of {total:,} tokens, {speed:,.0f} tokens/s, {left:,.0f} s left")

    return progress

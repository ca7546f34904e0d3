"""What `mm eval` shows on a terminal: tables, and progress with the time left."""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Iterator
from typing import Any

from mmcli.terminal import make_console


def show_report(report: dict[str, Any]) -> None:
    """The tables, the sentences that say how they came about, and the notes."""
    from mmcore.evaluation import report as reports

    console = make_console(highlight=False, markup=False)
    text = report["text"]
    title = f"{text['name']}: {text['documents']:,} documents, {text['bytes']:,} bytes"
    console.print(table(title, *reports.summary_rows(report)))
    header, rows = reports.position_rows(report)
    if rows:
        console.print(table("Loss by position, nats a token", header, rows))
    for sentence in (*reports.policy(report), *(f"Note: {note}." for note in report["notes"])):
        console.print(sentence, soft_wrap=True)


def table(title: str, header: list[str], rows: list[list[str]]):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    longest = max((len(row[0]) for row in rows), default=0)
    for index, name in enumerate(header):
        # Figures are never broken over two lines; a long name is, but none that a few columns hold.
        least = min(12, longest) if index == 0 else None
        table.add_column(
            Text(name), justify="right" if index else "left", no_wrap=index > 0, overflow="fold", min_width=least
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


@contextlib.contextmanager
def text_progress() -> Iterator[Any]:
    """callback(stage, tokens read, tokens to read) that shows speed and time left on standard error: a bar, or a
    plain line every 30 s where that is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield plain_text_progress(console)
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


def plain_text_progress(console: Any, every: float = 30.0):
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


@contextlib.contextmanager
def suite_progress(every: float = 30.0) -> Iterator[Any]:
    """callback(what is measured, work done, work in all) that shows the share done and the time left on standard error:
    a bar, or a plain line every `every` seconds where that is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield plain_suite_progress(console, every)
        return
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0)
        yield lambda what, done, total: bars.update(bar, description=what, completed=done / max(total, 1e-9))


def plain_suite_progress(console: Any, every: float) -> Any:
    """The callback for logs."""
    begun = shown = time.monotonic()

    def progress(what: str, done: float, total: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= every and done:
            shown = now
            console.print(f"{what}: {done / total:.0%} of all done, about {(now - begun) * (total / done - 1):,.0f} s left")

    return progress


def show_suites(report: dict[str, Any]) -> None:
    """The tables that sum up and the notes, on the console."""
    from mmcore.evaluation.suite_tables import tables

    console = make_console(highlight=False, markup=False)
    for one in tables(report):
        if not one.detail:
            console.print(suite_table(one))
            console.print(one.note, style="dim")
            console.print()
    for note in report["notes"]:
        console.print(f"Note: {note}.")


def suite_table(source: Any):
    """A table of suites for the console: groups are set apart, and what qualifies a figure stands below it, intervals in
    whole percents, so that 80 columns hold five figures."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(title=Text(source.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(source.header):
        if index < source.words:  # words are broken between words, figures never
            found = [word for row in source.rows for word in f"{row[index].text} {row[index].small} {name}".split()]
            grid.add_column(Text(name), min_width=max(map(len, found)), overflow="fold")
        else:
            widest = max(10, *(len(_beneath(row[index])) for row in source.rows))
            grid.add_column(Text("\n".join(textwrap.wrap(name, widest))), justify="right", no_wrap=True)
    before: list[Any] = []
    for row in source.rows:
        same = next((i for i in range(source.groups) if row[i] != (before[i] if before else None)), source.groups)
        if before and same == 0:
            grid.add_section()
        grid.add_row(*(Text() if index < same else _shown(cell) for index, cell in enumerate(row)))
        before = row
    return grid


def _shown(cell: Any):
    from rich.text import Text

    text = Text(cell.text, "bold" if cell.best else "")
    return text.append(f"\n{_beneath(cell)}", "not bold dim") if _beneath(cell) else text


def _beneath(cell: Any) -> str:
    return f"{cell.interval[0]:.0f}-{cell.interval[1]:.0f}" if cell.interval else cell.small

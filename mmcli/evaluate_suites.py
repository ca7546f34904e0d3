"""`mm eval --suite` and `mm eval --inspect`: options in words made settings, results shown."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmcore.errors import ConfigError

SHADES = " ▁▂▃▄▅▆▇█"
STRONGEST = 5
"""Tokens shown for each head."""


def run_suites(
    checkpoints: Sequence[Path], suites: Sequence[str], data: Sequence[Path], options: dict[str, Any], out: Path | None,
    as_json: bool,
) -> None:
    """Measure, write the result folder, show the tables. `options`: limit, tasks, lengths, shots, ... as given."""
    from mmcore.evaluation import suite_data, suite_report
    from mmcore.evaluation import suites as suite

    names = suite_data.SUITES if "all" in suites else tuple(dict.fromkeys(suites))
    lengths, shots = options.pop("lengths"), options.pop("shots")
    tasks = tuple(name for text in options.pop("tasks") or () for name in _split(text))
    settings = suite.SuiteSettings(
        suites=names, tasks=tasks, lengths=tuple(map(_tokens, _split(lengths))) if lengths else (),
        shots=tuple(sorted({_whole(word, "--shots") for word in _split(shots)})), **options,
    )
    folder = out or suite.default_folder(checkpoints, settings, data)
    _check_folder(folder)
    try:
        with show_progress() as report_progress:
            report = suite.run_suites(checkpoints, data, settings, folder, report_progress)
    except KeyboardInterrupt:
        print(f"Interrupted; what was measured is kept. The same command with --out {shlex.quote(str(folder))} goes on.",
              file=sys.stderr)
        raise
    suite_report.write(report, folder)
    if as_json:
        print(json.dumps(report | {"folder": str(folder)}, indent=2))
        return
    show_suites(report)
    print(f"Report: {folder / 'report.html'} (figures in results.json, items in items.jsonl)")
    print(f"Next: mm chat {shlex.quote(str(checkpoints[0]))}")


@contextlib.contextmanager
def show_progress(every: float = 30.0) -> Iterator[Any]:
    """callback(what is measured, work done, work in all) that shows the share done and the time left on standard error:
    a bar, or a plain line every `every` seconds where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield plain_progress(console, every)
        return
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0)
        yield lambda what, done, total: bars.update(bar, description=what, completed=done / max(total, 1e-9))


def plain_progress(console: Any, every: float) -> Any:
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
    """The tables and notes on the console."""
    from rich.console import Console

    from mmcli.evaluate import _table
    from mmcore.evaluation.suite_tables import tables

    console = Console(highlight=False, markup=False)
    for table in tables(report):
        shown = _table(table.title, table.header, table.rows)
        shown.columns[0].min_width = min(24, max(len(row[0]) for row in table.rows))
        console.print(shown)
        if table.note:
            console.print(table.note, soft_wrap=True)
    for note in report["notes"]:
        console.print(f"Note: {note}.", soft_wrap=True)


def run_inspection(
    checkpoint: Path, file: Path, token: int, without: Sequence[str], device: str, out: Path | None, as_json: bool
) -> None:
    """Show what every head reads at one token of a text, and draw it."""
    import mmcore
    from mmcore.errors import DataError
    from mmcore.evaluation import inspection, report, runner, suite_report

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text ({error}): give a UTF-8 text file") from None
    where = runner.pick_device(device)
    model = mmcore.load_model(checkpoint, device=str(where), without=tuple(without))
    tokenizer = mmcore.load_tokenizer(checkpoint)
    begin, _ = tokenizer.frame()
    ids = [begin, *tokenizer.encode(text)]
    reads = inspection.inspect(model, ids, token)
    place = token + len(ids) if token < 0 else token
    pieces = [_piece(tokenizer, one) for one in ids]
    folder = out or report.default_folder(checkpoint)
    title = f"{checkpoint}: what is read at token {place:,} ({pieces[place]!r}) of {file.name}"
    values = {"checkpoint": str(checkpoint), "file": str(file), "token": place, "text": pieces[place],
              "without": sorted(model.knocked_out), "reads": inspection.as_json(reads, place, pieces, STRONGEST)}
    with suite_report.drafted(folder, last="inspection.json") as draft:
        inspection.plot(reads, place, title, [draft / f"inspection.{ending}" for ending in ("png", "svg")])
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (draft / "inspection.json").write_text(text, encoding="utf-8")
    if as_json:
        print(json.dumps(values | {"folder": str(folder)}, indent=2))
        return
    for line in inspection_lines(values):
        print(line)
    print(f"Picture: {folder / 'inspection.png'} (and .svg; figures in inspection.json)")


def inspection_lines(values: dict[str, Any]) -> list[str]:
    """The inspection as text: a line for each head, its weight by distance as a bar of shades, its strongest tokens."""
    lines = [f"Token {values['token']:,}: {values['text']!r}. n: pairs in the memory; beta: bandwidth; the bar: share of "
             f"the weight at distances 0, 1, 2-3, 4-7, 8-15 ..."]
    current = None
    for read in values["reads"]:
        if (read["layer"], read["memory"]) != current:
            current = (read["layer"], read["memory"])
            lines.append(f"layer {read['layer']}, {read['memory'].replace('_', '-')}")
        if not read["size"]:
            lines.append(f"  head {read['head']:>2}  the memory is empty")
            continue
        bar = "".join(SHADES[min(8, round(8 * part["weight"]))] for part in read["by_distance"])
        found = "  ".join(f"{one['weight']:.2f} {one['token']!r} (-{one['distance']})" for one in read["strongest"])
        lines.append(f"  head {read['head']:>2}  n {read['size']:>6,}  beta {read['bandwidth']:>7.2f}  |{bar}|  {found}")
    return lines


def _piece(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], special=True, continues=True)


def _check_folder(folder: Path) -> None:
    """Raises ConfigError where something else than results of suites lies in the folder."""
    from mmcore.evaluation.journal import NAME

    taken = folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / NAME).is_file()))
    if taken:
        raise ConfigError(f"{folder} exists and holds no earlier results of suites: give --out a new folder")


def _split(text: str) -> list[str]:
    return [word for word in re.split(r"[,\s]+", text) if word]


def _tokens(word: str) -> int:
    """4k is 4,096 tokens, as in RULER."""
    match = re.fullmatch(r"(\d+)([kK]?)", word)
    if match is None:
        raise ConfigError(f"--lengths has {word!r}: write numbers of tokens, such as 1k,4k,32768")
    return int(match[1]) * (1024 if match[2] else 1)


def _whole(word: str, option: str) -> int:
    if not word.isdigit():
        raise ConfigError(f"{option} has {word!r}: write whole numbers, such as 1,2,4,8")
    return int(word)

"""`mm eval --suite`: options in words made settings, results shown."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcore.config.words import whole_number
from mmcore.errors import ConfigError


def run_suites(
    checkpoints: Sequence[Path], suites: Sequence[str], data: Sequence[Path], options: dict[str, Any], out: Path | None,
    as_json: bool,
) -> None:
    """Measure, write the result folder, show the tables. `options`: limit, tasks, lengths, shots, ... as given."""
    from mmcli.evaluate_console import show_suites, suite_progress
    from mmcore.evaluation import folders, suite_data, suite_report
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
        with suite_progress() as report_progress:
            report = suite.run_suites(checkpoints, data, settings, folder, report_progress)
    except KeyboardInterrupt:
        print(f"Interrupted; what was measured is kept. The same command with --out {shlex.quote(str(folder))} goes on.",
              file=sys.stderr)
        raise
    suite_report.write(report, folder)
    if as_json:
        print(folders.strict_json(report | {"folder": str(folder)}, ascii=True))
        return
    show_suites(report)
    print(f"Report: {folder / 'report.html'} (figures in results.json, items in items.jsonl)")
    print(f"Next: mm chat {shlex.quote(str(checkpoints[0]))}")


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
    thousands = word[-1] in "kK"
    number = whole_number(word[:-1] if thousands else word)
    if number is None:
        raise ConfigError(f"--lengths has {word!r}: write numbers of tokens, such as 1k,4k,32768")
    return number * (1024 if thousands else 1)


def _whole(word: str, option: str) -> int:
    number = whole_number(word)
    if number is None:
        raise ConfigError(f"{option} has {word!r}: write whole numbers, such as 1,2,4,8")
    return number

"""`mm eval`: loss, perplexity, bits per byte, and the loss by position; the paper's suites; what a model's heads read."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

ONLY = {
    "of text": ("text_key", "context", "stride", "longest", "max_tokens", "batch_size", "compressors"),
    "of suites": ("limit", "tasks", "lengths", "shots", "seed", "ruler_exact", "online"),
    "of --inspect": ("token",),
}
"""Options that one kind of measurement knows and the others do not."""


def evaluate(
    command: typer.Context,
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="CKPT...", help="Run folders, training checkpoints or exported folders."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Text to measure on (file or folder); may be repeated. "
                     "Without it: the documents that the first run held out. With --suite: folders and files of data."),
    ] = None,
    text_key: Annotated[
        str, typer.Option("--text-key", metavar="FIELD", help="The field that holds the text in jsonl and parquet.")
    ] = "text",
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
                     "empty, such as long_term,short_term; may be repeated."),
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
        Path | None, typer.Option("--out", help="Folder of the results. Default: eval-<time> in the run, or here where a "
                                  "checkpoint is a single file; for suites eval-suite-<hash of what is asked>, where an "
                                  "interrupted one goes on.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(
        metavar="FORMAT", help="Format of the weights: float32, bfloat16, float16, int8. Default: float32 on a CPU, "
                               "bfloat16 on a GPU.",
        show_default=False,
    )] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure loss, perplexity and bits per byte on text, and the loss by token position far past the trained context.

    With --suite: what the weights know (persistent), what is found in the context (new-knowledge), what is learnt from
    examples (in-context). Results are shown and written to a folder: JSON, Markdown, plots; of suites an HTML report.

    \b
    Example:
      mm eval runs/quickstart --compressors
      mm eval runs/stories runs/stories-transformer --data book.txt
      mm eval runs/stories --data book.txt --without long_term
      mm eval runs/a runs/b --suite all --without long_term --data data/ --limit 100
      mm eval runs/stories --suite in-context --data my-labels.csv --shots 1,2,4
      mm eval runs/stories --inspect story.txt --token -1
    """
    from mmcli.terminal import names_in, tell_of_slow_kernels
    from mmcore.errors import ConfigError

    given = _given(command)
    removed = names_in(",".join(without or ()))
    if "text_key" in given and not data:
        raise ConfigError("--text-key names a field of --data, and there is none: give --data FILE or leave it out")
    if inspect and (suite or data or len(checkpoints) > 1):
        raise ConfigError("--inspect looks at one text in one checkpoint: give it one, and no --suite or --data")
    if inspect:
        _refuse(given, "of --inspect", "--inspect")
    elif suite:
        _refuse(given, "of suites", "--suite")
    else:
        _refuse(given, "of text", "a measurement of text")
    tell_of_slow_kernels(device)
    if inspect:
        from mmcli.inspect_text import run_inspection

        run_inspection(checkpoints[0], inspect, token, removed, device, dtype, tokenizer, out, as_json)
    elif suite:
        from mmcli.evaluate_suites import run_suites

        run_suites(checkpoints, suite, data or (), {
            "limit": limit, "tasks": tasks, "lengths": lengths, "shots": shots, "seed": seed, "ruler_exact": ruler_exact,
            "online": online, "without": removed, "device": device, "dtype": dtype, "tokenizer": tokenizer,
        }, out, as_json)
    else:
        _measure_text(checkpoints, data or (), text_key, {
            "context": context, "stride": stride, "max_tokens": max_tokens or None, "batch_size": batch_size,
            "longest": longest, "without": removed, "compressors": compressors, "device": device, "tokenizer": tokenizer,
            "dtype": dtype,
        }, out, as_json)


def _given(command: typer.Context) -> Mapping[str, str]:
    """Parameter -> option, of those on the command line."""
    return {one.name: one.opts[0] for one in command.command.params
            if command.get_parameter_source(one.name).name == "COMMANDLINE"}


def _refuse(given: Mapping[str, str], mine: str, where: str) -> None:
    """Raises ConfigError for an option that would be without effect: its user has something else in mind."""
    from mmcore.errors import ConfigError

    for kind, names in ONLY.items():
        for name in names if kind != mine else ():
            if name in given:
                raise ConfigError(f"{given[name]} is an option {kind} and has no effect with {where}: leave it out")


def _measure_text(
    checkpoints: list[Path], data: list[Path], text_key: str, options: dict[str, Any], out: Path | None, as_json: bool
) -> None:
    from mmcli.evaluate_console import show_report, text_progress
    from mmcore.errors import ConfigError
    from mmcore.evaluation import folders
    from mmcore.evaluation import report as reports
    from mmcore.evaluation.runner import Settings
    from mmcore.evaluation.runner import evaluate as measure
    from mmcore.evaluation.text import held_out_text, read_files

    settings = Settings(**options)
    folder = reports.check_folder(out or folders.default_folder(checkpoints[0]))
    text = read_files(data, text_key) if data else held_out_text(checkpoints[0])
    with text_progress() as progress:
        report = measure(checkpoints, text, settings, progress)
    folder = out or folders.claim(folder)
    try:
        reports.write_results(report, folder)
    except ConfigError as error:  # somebody has put something there meanwhile; what was measured is not lost for it
        folder = folders.claim(folders.default_folder(checkpoints[0]))
        reports.write_results(report, folder)
        print(f"Note: {error}. The results are in {folder}.", file=sys.stderr)
    if as_json:
        print(folders.strict_json(report | {"folder": str(folder)}, ascii=True))
        return
    show_report(report)
    print(f"Results and plot: {folder}")
    print(f"Next: mm chat {shlex.quote(str(checkpoints[0]))}")

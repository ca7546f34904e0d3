"""`mm convert`: a checkpoint in another format, with the proof that it is the same model."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mmcli.terminal import make_console
from mmcore.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = ("float32", "bfloat16", "float16")
_TARGETS = ("hf", "train", "torch")


def convert(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="SRC", help="A run folder, a training checkpoint, an exported or Hugging Face Llama "
                       "folder, a PyTorch state dict, a llama2.c .bin, or a ckpt.pt of the public v1 code.",
                       show_default=False),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="DST", help="What to write; it appears whole or not at all.", show_default=False),
    ] = None,
    to: Annotated[
        str,
        typer.Option("--to", help="hf: a folder of safetensors, the baseline as LlamaForCausalLM. train: a run folder "
                     "to go on training from. torch: one .pt file."),
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default the source's.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 5GB or 500MB.")] = "5GB",
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A tokenizer's file or folder to go along; by default the source's.",
                     show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST once the new checkpoint is whole.")] = False,
    allow_nan: Annotated[
        bool, typer.Option("--allow-nan", help="Convert weights that hold NaN or infinity as they are.")
    ] = False,
    verify: Annotated[
        Path | None,
        typer.Option("--verify", metavar="CKPT", help="Check what was converted before against its certificate, and stop.",
                     show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
    list_formats: Annotated[bool, typer.Option("--list", help="Print the formats and stop.")] = False,
) -> None:
    """Convert a checkpoint, and certify that source and result compute the same.

    \b
    Example:
      mm convert runs/quickstart exported --dtype bfloat16
      mm convert Llama-3.2-1B runs/mine --to train
      mm convert --verify exported
    """  # fmt: skip
    if list_formats:
        return _print_formats(as_json)
    if verify is not None:
        return _verify(verify, as_json)
    if source is None or target is None:
        raise ConfigError("mm convert needs SRC and DST: for instance `mm convert runs/quickstart exported`")
    if to not in _TARGETS:
        raise ConfigError(f"--to is {to!r}: choose one of {', '.join(_TARGETS)}")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}: choose one of {', '.join(_DTYPES)}")
    limit = parse_size(max_shard_size)

    import torch

    from mmcore.checkpoint.convert import convert_checkpoint

    try:
        with _progress() as tell:
            made = convert_checkpoint(
                source, target, to=to, dtype=getattr(torch, dtype) if dtype else None, max_shard_bytes=limit,
                force=force, allow_nonfinite=allow_nan, command=shlex.join(["mm", *sys.argv[1:]]), progress=tell,
                tokenizer=tokenizer,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the files that are finished", file=sys.stderr)
        raise
    if as_json:
        _print_json(made)
    else:
        _print_certificate(made)


def parse_size(text: str) -> int:
    """5GB, 500 MB, 2GiB, 1000000 -> bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size is {text!r}: write it as 5GB, 500MB or a number of bytes")
    return size


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Takes (what, bytes done, all bytes): bars with rate and time left in a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    words = TextColumn("{task.description:<20}")
    columns = (words, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=make_console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
            bars.update(tasks[what], completed=done, total=total or None)

        yield tell


class _Lines:
    """Progress where no cursor can be moved: a line every five seconds of one piece of work."""

    def __init__(self, interval: float = 5.0):
        self.interval, self._what = interval, ""
        self._began = self._last = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        from mmcli.console import seconds, size

        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._last = what, now, now
        if now - self._last < self.interval or not total or not done:
            return
        self._last = now
        rate = done / (now - self._began)
        left = seconds(max(0, total - done) / rate)
        print(f"{what}: {size(done)} of {size(total)}, {size(rate)}/s, {left} left", file=sys.stderr, flush=True)


def _print_formats(as_json: bool) -> None:
    from mmcore.checkpoint.formats import FORMATS

    if as_json:
        import dataclasses
        import json

        print(json.dumps([{"name": name} | dataclasses.asdict(row) for name, row in FORMATS.items()], indent=2))
        return
    from rich.table import Column, Table

    heads = ("format", "what it is", "mm convert can", "carries", "lost")
    table = Table(*(Column(head, overflow="fold") for head in heads), show_lines=True)
    for name, row in FORMATS.items():
        table.add_row(name, row.what, row.can, row.carries, row.lost)
    make_console().print(table)


def _verify(path: Path, as_json: bool) -> None:
    from mmcore.checkpoint.verify import verify_conversion

    with _progress() as tell:
        found = verify_conversion(path, tell)
    if as_json:
        return _print_json(found)
    close = f"within {found.largest_difference:.3g} of those recorded, by another machine or version"
    logits = {"equal": "equal to the last bit", "close": close}
    _print_table(
        {
            "verified": found.result,
            "files": f"{found.files}, all as recorded",
            "logits": logits[found.logits],
            "source": found.source,
            "certificate": found.certificate,
        }
    )


def _print_json(values: object) -> None:
    import dataclasses
    import json

    print(json.dumps(dataclasses.asdict(values), indent=2))


def _print_certificate(made: Any) -> None:
    from mmcore.checkpoint.certificate import path_of
    from mmcore.checkpoint.convert import next_command

    allowed = f"at most {made.tolerance:.3g} for {made.dtype}" if made.rounded else "nothing is rounded: it must be 0"
    largest = f"largest logit {made.largest_logit:.3g}" if made.largest_logit is not None else "logits are not finite"
    rows = {
        "source": f"{made.source} ({made.source_format})",
        "result": f"{made.result} ({made.result_format}, {made.dtype})",
        "tensors": f"{made.tensors}, each the source's in {made.dtype}, bit for bit",
        "largest logit difference": f"{made.largest_difference:.3g} over {made.tokens} tokens ({allowed}; {largest})",
    }
    if made.optimizer is not None:
        rows["optimizer"] = made.optimizer
    rows |= {f"note {number}": note for number, note in enumerate(made.notes, 1)}
    if made.result_format != "train":
        rows["certificate"] = str(path_of(Path(made.result)))
    _print_table(rows)
    print(f"Next: {next_command(made)}")


def _print_table(rows: dict[str, str]) -> None:
    """Names and values; long values are not broken, so that paths can be copied."""
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name:<{width}}{''.join(c if c.isprintable() else ' ' for c in value)}")

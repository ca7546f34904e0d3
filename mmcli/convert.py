"""`mm convert`: a checkpoint in another format, with the proof that it is the same model."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmcore.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DTYPES = ("float32", "bfloat16", "float16")


def convert(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="SRC", help="A run folder, a training checkpoint, an exported or Hugging Face Llama "
                       "folder, or a llama2.c .bin.", show_default=False),
    ] = None,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="DST", help="The folder to write; it appears whole or not at all.", show_default=False),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="hf: config.json and safetensors, the baseline as LlamaForCausalLM.")
    ] = "hf",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default the source's.", show_default=False),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 5GB or 500MB.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace DST once the new checkpoint is whole.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
    list_formats: Annotated[bool, typer.Option("--list", help="Print the formats and stop.")] = False,
) -> None:
    """Convert a checkpoint, and certify that source and result compute the same.

    Example: mm convert runs/quickstart exported --dtype bfloat16
    """
    if list_formats:
        return _print_formats(as_json)
    if source is None or target is None:
        raise ConfigError("mm convert needs SRC and DST: for instance `mm convert runs/quickstart exported`")
    if to != "hf":
        raise ConfigError(f"--to is {to!r}: choose hf")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}: choose one of {', '.join(_DTYPES)}")
    limit = parse_size(max_shard_size)

    import torch

    from mmcore.checkpoint.convert import convert_checkpoint

    certificate = convert_checkpoint(
        source, target, dtype=getattr(torch, dtype) if dtype else None, max_shard_bytes=limit, force=force,
        command=shlex.join(["mm", *sys.argv[1:]]),
    )  # fmt: skip
    if as_json:
        _print_json(certificate)
    else:
        _print_certificate(certificate)


def parse_size(text: str) -> int:
    """5GB, 500 MB, 2GiB, 1000000 -> bytes. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ConfigError(f"--max-shard-size is {text!r}: write it as 5GB, 500MB or a number of bytes")
    return size


def _print_formats(as_json: bool) -> None:
    from mmcore.checkpoint.formats import FORMATS

    if as_json:
        import json

        rows = [{"name": name, "what": what, "can": can} for name, (what, can) in FORMATS.items()]
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("format", "what it is", "mm convert can")
    for name, (what, can) in FORMATS.items():
        table.add_row(name, what, can)
    Console().print(table)


def _print_json(certificate: object) -> None:
    import dataclasses
    import json

    print(json.dumps(dataclasses.asdict(certificate), indent=2))


def _print_certificate(certificate: object) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = {
        "source": f"{certificate.source} ({certificate.source_format})",
        "result": f"{certificate.result} ({certificate.dtype})",
        "largest logit difference": f"{certificate.largest_difference:.3g} over {certificate.tokens} tokens "
        f"(at most {certificate.tolerance:.3g}; largest logit {certificate.largest_logit:.3g})",
        "certificate": str(Path(certificate.result) / "certificate.json"),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console = Console()
    console.print(table)
    console.print(f"Next: [bold]mm chat {escape(shlex.quote(certificate.result))}[/bold]", highlight=False)

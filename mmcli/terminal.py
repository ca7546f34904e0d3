"""What may be printed. A model's text, the names in a checkpoint and a loaded conversation are untrusted: a
terminal obeys control characters, and text that changes its own direction can show other words than it holds."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_UNSAFE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f"  # C0 but newline and tab: escape, bell, backspace, carriage return ...
    "\x7f-\x9f"  # DEL and C1, which hold the one-byte forms of the escape sequences
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates of direction
    "\ufff9-\ufffb"  # interlinear annotation
    "\U000e0000-\U000e007f"  # invisible tag characters
    "]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """`text` without what a terminal would obey rather than show. Works piece by piece: no state is needed,
    since without its first character no escape sequence is left, only its visible rest."""
    return _SURROGATES.sub("\ufffd", _UNSAFE.sub("", text))


def clean_line(text: str, limit: int = 200) -> str:
    """The same on one line and at most `limit` characters long, for names."""
    line = " ".join(clean(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def dim(text: str, stream: TextIO) -> str:
    """`text` in a fainter colour where `stream` is a terminal and NO_COLOR is not set."""
    plain = not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\x1b[2m{text}\x1b[0m"


def make_console(**settings: Any) -> Console:
    """Rich's console, with a closed pipe raised as by any other writer: rich would end the program as a failed one."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:
            raise  # the error that is being handled

    return Piped(**settings)


def drop_output() -> None:
    """Let what is written to standard output go nowhere from now on, what is still in its buffer included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def names_in(text: str | None) -> tuple[str, ...]:
    """The names of an option that takes several with commas between them."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def tolerate_narrow_encodings() -> None:
    """Let a terminal that cannot show a character show a stand-in, instead of the program failing there."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def tell_of_slow_kernels(device: str) -> None:
    """A line on standard error where `device` (auto, cpu or cuda) is a CPU for which no kernels can be compiled."""
    import torch

    from mmcore.kernels import dispatch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        if notice := dispatch.notice():
            print(f"note: {notice}", file=sys.stderr)

"""What a user, or a file, says in words -> a path or a number."""

from __future__ import annotations

import os
from pathlib import Path

from mmcore.errors import ConfigError, MMError

_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes that Linux takes. The functions of pathlib that only ask whether a file is there raise OSError beyond."""


def expanded(text: str | os.PathLike[str], error: type[MMError] = ConfigError) -> str:
    """A path with the user's folder for its `~`, which shells leave alone after `--set key=` and in `mm chat`.

    Raises `error` for what no file can be called: a name too long or no text, or `~` where there is no such folder.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise error(f"{text}: there is no home folder {path.partition('/')[0]}: write the whole path")
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name:
        raise error(f"{path!r} holds characters that no file's name can have: give another name")
    if len(name) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in name.split(b"/")):
        raise error(f"{path} is too long for a file's name: give a shorter one")
    return path


def cache_root(error: type[MMError] = ConfigError) -> Path:
    """Where what can be made again is kept: $MM_CACHE, else ~/.cache/mm. Raises `error` where that is no place."""
    place = os.environ.get("MM_CACHE") or "~/.cache/mm"
    try:
        return Path(expanded(place))
    except ConfigError:
        raise error(f"{place} cannot be the cache folder: set MM_CACHE to one of your own") from None


def whole_number(text: str) -> int | None:
    """A number of digits alone; None for other words, and for ², which is a digit to str.isdigit and no number to int."""
    try:
        return int(text) if text.isdecimal() else None
    except ValueError:  # more digits than Python reads
        return None

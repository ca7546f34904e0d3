"""Reading what strangers wrote: file names, words for the terminal, JSON.

Whatever the bytes are, only CheckpointError comes out (ValueError from parse_json_object), with a text that is safe
to print.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from mmcore.errors import CheckpointError

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,200}")
_HUB_LINK = re.compile(r"\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})")


def is_plain_name(name: Any) -> bool:
    """Whether `name` is a file name and nothing more: no separators, no `..`, no hidden or odd characters."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def shown(text: str, limit: int = 120) -> str:
    """`text` from a file as it may be printed: control and direction characters escaped, shortened to `limit`."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """A JSON object from an untrusted file; a key given twice is refused. Raises CheckpointError."""
    try:
        size = require_regular(path)
        with open(path, "rb") as file:
            data = file.read(min(size, limit) + 1)  # Python sets aside as many bytes as are asked for
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} is larger than {limit >> 20} MiB: it is not what its name says")
    try:
        return parse_json_object(data)
    except ValueError as error:
        raise CheckpointError(f"{path} is not usable JSON ({error}): get the file again") from error


def parse_json_object(data: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys. Raises ValueError, whose text is safe to print."""
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except _DuplicateKey:
        raise
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg}, line {error.lineno}") from None
    except ValueError:
        raise ValueError("a number with too many digits") from None
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return values


class _DuplicateKey(ValueError):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _DuplicateKey(f"the key {shown(twice)} is given twice")
    return values


def require_regular(path: Path) -> int:
    """The size of a regular file. Raises CheckpointError where it is missing, a link, or anything else.

    One kind of link counts as the file it leads to: that of a snapshot in the Hugging Face hub's cache (`hub_blob`).
    """
    try:
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode) and (blob := hub_blob(path)) is not None:
            path, status = blob, os.lstat(blob)
    except OSError as error:
        raise CheckpointError(f"{path} is missing ({error.strerror}): get the checkpoint again") from None
    if stat.S_ISLNK(status.st_mode):
        raise CheckpointError(f"{path} is a link, and links are not followed: copy the folder with `cp -rL`")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a file: get the checkpoint again")
    return status.st_size


def hub_blob(link: Path) -> Path | None:
    """The file behind `models--x--y/snapshots/<revision>/<name>` -> `../../blobs/<hash>`, or None for other links.

    The link must say exactly that, and neither the snapshot nor blobs may be links themselves: whoever made the
    folder can then only lead to files of that same folder.
    """
    words = _HUB_LINK.fullmatch(os.readlink(link))
    snapshot = Path(os.path.realpath(link.parent))
    blobs = snapshot.parent.parent / "blobs"
    if words is None or snapshot.parent.name != "snapshots" or not stat.S_ISDIR(os.lstat(blobs).st_mode):
        return None
    return blobs / words[1]

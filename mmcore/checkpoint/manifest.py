"""manifest.json of a training checkpoint: the size and SHA-256 of every other file, written last.

A checkpoint is whole where its manifest is there, can be read, and every file it names is as it says
(integrity.py). Files that it does not name are never read, so they do no harm.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mmcore import __version__
from mmcore.checkpoint import disk, untrusted
from mmcore.checkpoint.disk import FileRecord
from mmcore.checkpoint.untrusted import shown
from mmcore.errors import CheckpointError

NAME = "manifest.json"
FORMAT = "memory-mosaics-training-checkpoint"
VERSION = 1
"""Raised when a reader of the present version could no longer make sense of the files."""

_HASH = re.compile(r"[0-9a-f]{64}")


def write_manifest(folder: Path, step: int, records: dict[str, FileRecord]) -> None:
    """Write manifest.json durably. Raises OSError."""
    files = {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in sorted(records.items())}
    values = {"format": FORMAT, "format_version": VERSION, "mm_version": __version__, "step": step, "files": files}
    disk.write_json(folder / NAME, values)


def read_manifest(folder: Path) -> tuple[int, dict[str, FileRecord]]:
    """The step and the records of a training checkpoint's files. Raises CheckpointError."""
    path = folder / NAME
    values = untrusted.read_json(path)
    version, step, files = values.get("format_version"), values.get("step"), values.get("files")
    if values.get("format") != FORMAT or type(version) is not int:
        raise CheckpointError(f"{path} is not the manifest of a training checkpoint")
    if version > VERSION:
        raise CheckpointError(
            f"{path} has format {version} and this version of mm reads up to {VERSION}: install a newer mm"
        )
    if type(step) is not int or not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} is damaged: it names no step or no files")
    return step, {name: _record(path, name, entry) for name, entry in files.items()}


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    if untrusted.is_plain_name(name) and isinstance(entry, dict):
        size, sha256 = entry.get("bytes"), entry.get("sha256")
        if type(size) is int and isinstance(sha256, str) and _HASH.fullmatch(sha256):
            return FileRecord(size, sha256)
    raise CheckpointError(f"{path} is damaged: its entry {shown(name)} is not a file's size and hash")


def folder_name(step: int) -> str:
    return f"step-{step:06d}"

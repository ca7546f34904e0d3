"""manifest.json of a training checkpoint: the size and SHA-256 of every other file, written last.

A checkpoint is whole where its manifest is there, can be read, and every file it names is as it says. Files
that it does not name are never read, so they do no harm.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
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


def check(folder: Path, *, hashes: bool = True) -> dict[str, FileRecord]:
    """Verify a training checkpoint and return its records. Raises CheckpointError with all that is wrong.

    hashes=False compares only names and sizes; otherwise every byte is read, in as many threads as pay.
    """
    step, records = read_manifest(folder)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        faults = pool.map(lambda item: _fault(folder / item[0], item[1], hashes), records.items())
        problems = [fault for fault in faults if fault]
    if folder.name.startswith("step-") and disk.final_name(folder)[0] != folder_name(step):
        problems.append(f"its manifest is of step {step}")
    if problems:
        raise CheckpointError(f"{folder} is not whole: {'; '.join(problems)}")
    return records


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _fault(path: Path, record: FileRecord, hashes: bool) -> str | None:
    try:
        size = untrusted.require_regular(path)
        if size != record.bytes:
            return f"{path.name} has {size} bytes of {record.bytes}"
        if hashes and disk.hash_file(path) != record:
            return f"{path.name} was altered"
    except CheckpointError:
        return f"{path.name} is missing" if not os.path.lexists(path) else f"{path.name} is a link or no file"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None

"""Whether a training checkpoint is whole: every file that its manifest names is there, as it was written.

Several ranks share the reading: each hashes some of the files and hears what the others found, so that all come to
the same answer and none reads everything.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmcore.checkpoint import disk, manifest, sharded, untrusted
from mmcore.checkpoint.disk import FileRecord
from mmcore.checkpoint.manifest import read_manifest
from mmcore.distributed.mesh import World
from mmcore.distributed.messages import Messages
from mmcore.errors import CheckpointError

ALONE = Messages(World())
"""For a process that asks nobody."""

Records = dict[str, FileRecord]


Hashes = bool | frozenset[str]
"""Whose bytes are read: every file's, none's (only names and sizes are compared), or those of some names."""


def check(folder: Path, *, hashes: Hashes = True, messages: Messages = ALONE) -> Records:
    """Verify a training checkpoint and return its records. Raises CheckpointError with all that is wrong.

    Where every byte is read, all ranks together read it, in as many threads as pay, and so are the headers of a sharded
    checkpoint's files. All ranks raise, or none.
    """
    records, problems = messages.each(lambda: _look(folder, hashes, messages))
    problems = list(dict.fromkeys(fault for faults in messages.share(problems) for fault in faults))
    if len(problems) == 1 and problems[0].startswith(f"{folder}{os.sep}"):
        raise CheckpointError(problems[0])
    if problems:
        raise CheckpointError(f"{folder} is not whole: {'; '.join(problems)}")
    return records


def _look(folder: Path, hashes: Hashes, messages: Messages) -> tuple[Records, list[str]]:
    """The records, and what this rank finds wrong. Does not raise: the other ranks wait for the answer."""
    records: Records = {}
    problems: list[str] = []
    try:
        step, records = read_manifest(folder)
        if folder.name.startswith("step-") and disk.final_name(folder)[0] != manifest.folder_name(step):
            problems.append(f"its manifest is of step {step}")
        problems += _faults(folder, records, hashes, messages)
    except CheckpointError as error:
        problems.append(str(error))
    return records, problems


def _faults(folder: Path, records: Records, hashes: Hashes, messages: Messages) -> list[str]:
    """What is wrong with this rank's part of the files: every size-th of them, the largest dealt out first."""
    by_size = sorted(records, key=lambda name: (-records[name].bytes, name))
    mine = by_size[messages.rank :: messages.size]
    read = set(records) if hashes is True else hashes or ()
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter's lock
        looks = pool.map(lambda name: _fault(folder / name, records[name], name in read), mine)
        faults = dict(zip(mine, looks, strict=True))
    problems = [fault for fault in faults.values() if fault]
    if hashes is True and sharded.NAME in records and not faults.get(sharded.NAME):
        problems += _shard_faults(folder, records, [name for name in mine if not faults[name]])
    return problems


def _shard_faults(folder: Path, records: Records, sound: list[str]) -> list[str]:
    """Contradictions between shards.json, the manifest and the headers of the files `sound`."""
    shards = [name for name in records if name.endswith(".safetensors")]
    known: set[str] = set()
    problems: list[str] = []
    for section in sharded.SECTIONS:
        files = sharded.find_pieces(folder, section, records)
        known |= {path.name for path in files.files}
        problems += sharded.file_faults(files, [path for path in files.files if path.name in sound])
    strangers = [name for name in shards if name not in known]
    return problems + [f"{name} belongs to no tensor of {sharded.NAME}" for name in strangers]


def _fault(path: Path, record: FileRecord, read: bool) -> str | None:
    try:
        size = untrusted.require_regular(path)
        if size != record.bytes:
            return f"{path.name} has {size} bytes of {record.bytes}"
        if read and disk.hash_file(path) != record:
            return f"{path.name} was altered"
    except CheckpointError:
        return f"{path.name} is missing" if not os.path.lexists(path) else f"{path.name} is a link or no file"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None

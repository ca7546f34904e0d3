"""Durable files, and folders that appear under their name in one step.

A folder is written as `<name>.tmp-<uuid>`, every file and the folder itself are synced, and only then is it
renamed. A rename cannot replace a folder that has files in it, so the old one first steps aside as
`<name>.old-<uuid>`; after a crash between the two renames `recover` (called by the next writer) gives it its
name back, and readers that look for `.old-` folders find it until then. A writer holds a lock on its temporary
folder, which the system drops when it dies: that is how stale folders are told from those being written.

Only os.* calls are used to change the disk, so that a test can count them and stop the process at each.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.errors import CheckpointError

CHUNK = 4 << 20
"""Bytes hashed and written at once. 1 to 16 MiB were equally fast; larger chunks fall out of the cache between
the two passes."""

_TEMPORARY = re.compile(r"\.(tmp|old)-[0-9a-f]{32}$")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about a file."""

    bytes: int
    sha256: str


@contextmanager
def writing(what: Path | str, kept: str) -> Iterator[None]:
    """Turn a failure of the disk while writing `what` into one sentence; `kept` says what is still there."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            reason = f"the disk is full: free some space, or write to another disk; {kept}"
        elif error.errno in _FORBIDDEN:
            reason = f"no permission to write there: change the permissions, or choose another folder; {kept}"
        else:
            reason = f"{error.strerror or error}: check the disk and the path; {kept}"
        raise CheckpointError(f"cannot write {what}: {reason}") from error


class NewFile:
    """A file that must not exist yet, hashed while it is written. `close` returns once it is on the disk.

    A second thread hashes a chunk while the first writes it: SHA-256 reads about 1 GB/s, no faster than a disk writes.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._descriptor = os.open(path, flags, 0o666)
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)  # starts its thread with the first chunk
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            hashed = self._hasher.submit(self._hash.update, chunk) if len(chunk) >= 1 << 16 else None
            if hashed is None:
                self._hash.update(chunk)
            while len(chunk):
                chunk = chunk[os.write(self._descriptor, chunk) :]
            if hashed is not None:
                hashed.result()
        self._bytes += len(view)

    def close(self) -> FileRecord:
        os.fsync(self._descriptor)
        self._release()
        return FileRecord(self._bytes, self._hash.hexdigest())

    def _release(self) -> None:
        self._hasher.shutdown()
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()


def write_file(path: Path, chunks: Iterable[bytes]) -> FileRecord:
    """Write a new file durably. Raises OSError."""
    with NewFile(path) as file:
        for chunk in chunks:
            file.write(chunk)
        return file.close()


def write_json(path: Path, values: dict[str, Any]) -> FileRecord:
    """Write a new JSON file durably. Raises OSError; ValueError for what JSON cannot hold (NaN included)."""
    return write_file(path, [json_bytes(values)])


def finite(values: Any) -> Any:
    """Plain values with null for numbers that are not finite, which JSON cannot hold: Python would write Infinity."""
    if isinstance(values, dict):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def json_bytes(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> FileRecord:
    """Size and SHA-256 of a file, read in pieces; `progress` hears of the bytes of each. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
            if progress is not None:
                progress(count)
    return FileRecord(size, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """`path` and its parents, their names durable. Raises OSError."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
        except FileExistsError:  # another process made it in the meantime, or a file is in the way
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file") from None
        sync_folder(folder.parent)


def temporary_name(target: Path, kind: str = "tmp") -> Path:
    """A free name beside `target`: tmp while it is written, old while it is replaced."""
    return target.with_name(f"{target.name}.{kind}-{uuid.uuid4().hex}")


def final_name(path: Path) -> tuple[str, str | None]:
    """The name a folder has or will have, and what it is now: tmp, old, or None for one in its place."""
    match = _TEMPORARY.search(path.name)
    return (path.name[: match.start()], match[1]) if match else (path.name, None)


def remove_folder(path: Path) -> None:
    """Remove a folder of files (and folders). It first loses its name, so that a crash leaves no half of it."""
    if final_name(path)[1] is None:
        away = temporary_name(path)
        os.rename(path, away)
        path = away
    _empty(path)
    os.rmdir(path)


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _empty(Path(entry.path))
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` to write into; it takes target's place when the block ends well.

    The caller syncs the files. Where the block fails the folder is removed and `target` stays as it was.
    """
    temporary = temporary_name(target)
    os.mkdir(temporary)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield temporary
        sync_folder(temporary)
        publish(temporary, target)
    except BaseException:
        if temporary.exists():
            remove_folder(temporary)
        raise
    finally:
        os.close(lock)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished folder its name; a folder or a link that had it before is removed afterwards. Raises OSError."""
    old = None
    if os.path.lexists(target):
        old = temporary_name(target, "old")
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    if old is None:
        return
    if old.is_symlink():
        os.unlink(old)
    elif old.is_dir():  # a file is nothing of ours: it stays, with the name that it stepped aside to
        remove_folder(old)


def recover(parent: Path, wanted: Callable[[str], bool], spare: Path | None = None) -> None:
    """Clear away what killed writers left in `parent` of the folders whose names are `wanted`.

    A folder that stepped aside for one that never came gets its name back; everything else temporary goes,
    but not what a living process is writing, nor `spare`. Raises OSError.
    """
    for path in sorted(parent.iterdir()):
        name, kind = final_name(path)
        if kind is None or path == spare or not wanted(name) or not _abandoned(path):
            continue
        if kind == "old" and not os.path.lexists(parent / name):
            os.rename(path, parent / name)
            sync_folder(parent)
        else:
            remove_folder(path)


class Hold:
    """Keeps a finished folder from being purged by another process while this object lives.

    Holds nothing where the file system has no locks, or where the folder is gone: who reads it then says so.
    """

    def __init__(self, folder: Path):
        self._descriptor = -1
        with suppress(OSError):
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def remove_unless_held(path: Path) -> bool:
    """Remove a folder unless a living process holds it; whether it is gone. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _try_lock(descriptor) is False:
            return False
        remove_folder(path)
        return True
    finally:
        os.close(descriptor)


def lock_folder(path: Path) -> int | None:
    """A descriptor that keeps `recover` off a folder until it is closed; None where another process has one.

    Raises OSError, also for a link.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if _try_lock(descriptor) is False:
        os.close(descriptor)
        return None
    return descriptor


def _try_lock(descriptor: int) -> bool | None:
    """Whether this process now has the lock; None where the file system has no locks for folders (NFS)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _abandoned(path: Path) -> bool:
    """Whether the writer of a temporary folder is gone. Without locks: whether it was silent for a day."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        locked = _try_lock(descriptor)
        return locked if locked is not None else time.time() - os.fstat(descriptor).st_mtime > 86_400
    finally:
        os.close(descriptor)

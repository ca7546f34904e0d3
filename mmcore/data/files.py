"""Writing files whole or not at all, and saying what is wrong with a disk."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from mmcore.errors import DataError

PART_MARK = ".part-"


@contextlib.contextmanager
def disk_faults(folder: Path) -> Iterator[None]:
    """Turn what a disk can refuse while `folder` is written into a DataError with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk of {folder} is full: free space, or set data.cache to a folder on another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"{folder} cannot be written ({error.strerror}): set data.cache to a folder of your own"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            message = f"{folder} is not a folder: set data.cache to another place"
        else:
            message = f"{folder} cannot be written ({error.strerror}): check the disk, or set data.cache to another one"
        raise DataError(message) from None


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a passing name, flush it to disk, and give it its name; a failure leaves nothing."""
    part = path.with_name(f"{path.name}{PART_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")
    with disk_faults(path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def remove_parts(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`. Call it under the folder's lock only."""
    for part in folder.rglob(f"*{PART_MARK}*"):
        part.unlink(missing_ok=True)

"""A temporary folder that outlives its writer, so that a conversion that was killed goes on where it was.

Its name is `<target>.tmp-<key>`, where the key says all that decides the result (hashes of the source, options,
version): only a run that would write the very same files finds it again. A journal names each large file that is
finished and on the disk, with its hash; the next run reads those files once, keeps the ones that are as the journal
says, and writes the others anew. A folder of another key is stale: `disk.recover` removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmcore.checkpoint import disk
from mmcore.checkpoint.disk import FileRecord
from mmcore.errors import CheckpointError

JOURNAL = ".journal"


def staging_key(decides: dict[str, Any]) -> str:
    """32 hexadecimal digits from plain values."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


class Staging:
    """The folder `path`, and the files that are finished in it."""

    def __init__(self, path: Path, progress: Callable[[int], None] | None = None):
        self.path = path
        self.progress = progress or (lambda count: None)
        """Hears of the bytes of tensors that were written."""
        self.done: dict[str, FileRecord] = {}
        """Files that an earlier run finished and this one found unchanged, by their path in the folder."""

    def take_stock(self) -> None:
        """Find what an earlier run finished, and remove everything else. Raises OSError."""
        for name, record in self._journal():
            file = self.path / name
            if not file.is_symlink() and file.is_file() and disk.hash_file(file) == record:
                self.done[name] = record
        self._sweep(self.path)
        (self.path / JOURNAL).unlink(missing_ok=True)
        for name, record in self.done.items():
            self._note(name, record)

    def _journal(self) -> Iterator[tuple[str, FileRecord]]:
        """Its lines; one that was being written when the writer died ends them."""
        try:
            lines = (self.path / JOURNAL).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return
        for line in lines:
            try:
                name, size, sha256 = json.loads(line)
            except ValueError:
                return
            yield name, FileRecord(size, sha256)

    def _sweep(self, folder: Path) -> None:
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                self._sweep(Path(entry.path))
                if not os.listdir(entry.path):
                    os.rmdir(entry.path)
            elif entry.name != JOURNAL and os.path.relpath(entry.path, self.path) not in self.done:
                os.unlink(entry.path)

    def finished(self, file: Path) -> FileRecord | None:
        """The record of a file that need not be written again."""
        return self.done.get(os.path.relpath(file, self.path))

    def finish(self, file: Path, record: FileRecord) -> None:
        """Note a file that is whole and on the disk. Raises OSError."""
        name = os.path.relpath(file, self.path)
        disk.sync_folder(file.parent)
        self.done[name] = record
        self._note(name, record)

    def _note(self, name: str, record: FileRecord) -> None:
        descriptor = os.open(self.path / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, (json.dumps([name, record.bytes, record.sha256]) + "\n").encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Remove the journal: the folder is ready for its name."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        disk.sync_folder(self.path)


@contextmanager
def resumable_folder(
    target: Path,
    key: str,
    progress: Callable[[int], None] | None = None,
    publish: Callable[[Path, Path], None] = disk.publish,
) -> Iterator[Staging]:
    """disk.new_folder for work that may be interrupted and gone on with.

    Where the process dies or Ctrl-C is pressed, finished files stay for the next run with the same key; after any
    other failure nothing is left. publish gives the folder, or what is in it, its name. Raises CheckpointError where
    another process is writing the same, OSError.
    """
    temporary = target.with_name(f"{target.name}.tmp-{key}")
    if not temporary.is_dir():
        os.mkdir(temporary)
    lock = disk.lock_folder(temporary)
    if lock is None:
        raise CheckpointError(f"another process is writing {target}: wait for it, or choose another name")
    try:
        disk.recover(target.parent, lambda name: name == target.name, spare=temporary)
        try:
            staging = Staging(temporary, progress)
            staging.take_stock()
            yield staging
            staging.close()
            publish(temporary, target)
        except KeyboardInterrupt:
            if not staging.done:
                disk.remove_folder(temporary)
            raise
        except BaseException:
            if temporary.exists():
                disk.remove_folder(temporary)
            raise
    finally:
        os.close(lock)

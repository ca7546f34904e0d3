"""The files of a source: those that a folder holds, and whether each is still what it was when it was found."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mmcore.errors import DataError

State = tuple[int, int, int]
"""Size, time of modification and time of change (both ns): equal as long as nobody writes to a file. Whoever keeps the
size and sets the time of modification back still moves the time of change; so does a new link, owner or permission."""


def file_state(path: Path) -> State:
    """The State of a file. Raises OSError."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def file_hash(path: Path) -> str:
    """The SHA-256 of a file. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(eq=False)
class SourceFile:
    """A file of a source: `name` is relative to the source, `state` that in which it was found, `sha256` is known once it
    was hashed."""

    name: str
    path: Path
    state: State
    sha256: str | None = None

    @classmethod
    def found(cls, name: str, path: Path) -> SourceFile:
        """Raises DataError where the file cannot be looked at."""
        try:
            return cls(name, path, file_state(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check the file and its permissions") from None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.state[0]

    def unchanged(self) -> bool:
        """Whether it is as it was when it was found. Where the time of change alone is another, its hash decides."""
        try:
            state = file_state(self.path)
            if state == self.state:
                return True
            if self.sha256 is None or state[:2] != self.state[:2] or file_hash(self.path) != self.sha256:
                return False
        except OSError:
            return False
        self.state = state  # not to hash it again at every look
        return True


def check_unchanged(files: Iterable[SourceFile]) -> None:
    """Raise DataError for the first file that is not as it was when it was found."""
    for file in files:
        if not file.unchanged():
            raise DataError(f"{file.path} changed while it was read: start again once nothing writes to it")


def find_files(root: Path, endings: tuple[str, ...], left_out: Callable[[str], bool] = lambda folder: False,
               follow: bool = True) -> tuple[list[SourceFile], Counter[str]]:  # fmt: skip
    """The files below `root` with these endings, sorted by name, and a count of the endings of all others.

    Hidden folders and those whose names are `left_out` are passed over. With `follow` the folders that links lead to
    are read after the others, and each folder once, so that links in a circle come to an end. Raises DataError.
    """
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from None

    files: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    tops = [str(root)]
    for top in tops:  # which grows by the links that are met
        for folder, folders, names in os.walk(top, onerror=refuse):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and not left_out(f))
            if follow:
                tops += [path for f in folders if os.path.islink(path := os.path.join(folder, f))]
            for name in sorted(names):
                path = Path(folder) / name
                if name.startswith(".") or not name.endswith(endings) or not path.is_file():
                    skipped[path.suffix or name] += 1
                    continue
                files.append(SourceFile.found(path.relative_to(root).as_posix(), path))
    return sorted(files, key=lambda file: file.name), skipped

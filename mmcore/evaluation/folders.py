"""Where results are written: which folder, and that nothing of anybody's is lost there."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmcore.checkpoint.disk import finite
from mmcore.errors import HardwareError


def default_folder(checkpoint: str | Path) -> Path:
    """An `eval-<time>` that is not there yet, in the run of a checkpoint or in the folder of an exported one; of a single
    file, which may lie among others' data, in the working folder."""
    path = Path(checkpoint)
    if path.is_file():
        path = Path()
    elif path.parent.name == "checkpoints":  # a training checkpoint is sealed by its manifest
        path = path.parent.parent
    elif path.name == "checkpoints":
        path = path.parent
    return _free(path / time.strftime("eval-%Y%m%d-%H%M%S"))


def _free(folder: Path) -> Path:
    found, count = folder, 1
    while found.exists():
        count += 1
        found = folder.with_name(f"{folder.name}-{count}")
    return found


def claim(folder: str | Path) -> Path:
    """Make a folder of this name or, where another process has made it meanwhile, of the next free one.

    Raises HardwareError where the disk refuses.
    """
    found = Path(folder)
    while True:
        try:
            found.mkdir(parents=True)
            return found
        except FileExistsError:
            found = _free(Path(folder))
        except OSError as error:
            raise _refused(found, error) from error


def require_writable(folder: Path) -> None:
    """Raises HardwareError where a folder, or the one that it would be made in, cannot be written."""
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise HardwareError(f"{folder} cannot be written (no permission in {parent}): give --out another folder")


@contextlib.contextmanager
def drafted(folder: str | Path, last: str) -> Iterator[Path]:
    """A folder for files that move into `folder` when the block ends well, each in one step, `last` after all others.

    Raises HardwareError where the disk refuses. A folder that holds nothing then is taken away again.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as name:
            yield Path(name)
            for path in sorted(Path(name).iterdir(), key=lambda path: (path.name == last, path.name)):
                os.replace(path, folder / path.name)
    except OSError as error:
        raise _refused(folder, error) from error
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # refuses where something is in it


def strict_json(values: Any, ascii: bool = False) -> str:
    """Plain values as JSON that any reader takes: null for numbers that are not finite, as a perplexity beyond floats.
    `ascii`: for terminals of any encoding."""
    return json.dumps(finite(values), indent=2, ensure_ascii=ascii, allow_nan=False)


def _refused(folder: Path, error: OSError) -> HardwareError:
    return HardwareError(f"{folder} cannot be written ({error.strerror}): give --out another folder")

"""Which checkpoints of a run stay."""

from __future__ import annotations

from pathlib import Path

from mmcore.checkpoint import disk, integrity
from mmcore.checkpoint.resolve import steps_in
from mmcore.errors import CheckpointError


def purge(newest: Path, *, keep_last: int, keep_every: int = 0, protected: frozenset[str] = frozenset()) -> None:
    """Remove checkpoints older than `newest`, which is whole, so that `keep_last` remain, itself counted.

    keep_last=0 keeps all. Steps that keep_every divides stay for ever (0: none do), the folders named in `protected`
    stay, and so does one that another process is reading: it goes at the next purge. Later steps (left by a run that
    was resumed from an earlier one) stay, and folders that lack files are not counted as kept: what remains can be
    resumed from. Raises CheckpointError where the disk refuses.
    """
    if keep_last < 1:
        return
    kept, newest_step = 1, int(newest.name.removeprefix("step-"))
    for step, path in steps_in(newest.parent):
        if step >= newest_step or path.name in protected:
            continue
        if kept < keep_last:
            kept += _has_all_files(path)
        elif not keep_every or step % keep_every:
            with disk.writing(path, f"{newest.name} was saved, but this older checkpoint could not be removed"):
                disk.remove_unless_held(path)


def _has_all_files(path: Path) -> bool:
    try:
        integrity.check(path, hashes=False)
    except CheckpointError:
        return False
    return True

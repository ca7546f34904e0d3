"""What the user typed -> the checkpoint that is meant."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from mmcore.checkpoint import disk, integrity, manifest
from mmcore.checkpoint.untrusted import shown
from mmcore.distributed.messages import Messages
from mmcore.errors import CheckpointError

_STEP = re.compile(r"step-(\d{6,12})")
_FILES = (".bin", ".pt", ".pth")
"""Ends of files that are checkpoints by themselves."""
_log = logging.getLogger(__name__)

Report = Callable[[str], None]
"""Takes one sentence on a checkpoint that was passed over, and why."""


def steps_in(checkpoints: Path) -> list[tuple[int, Path]]:
    """Folders that are, or stepped aside as, checkpoints, newest first; the one in its place before the others."""
    found = []
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        name, kind = disk.final_name(path)
        match = _STEP.fullmatch(name)
        if match and kind != "tmp" and path.is_dir() and not path.is_symlink():
            found.append((int(match[1]), kind is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def iterate_whole(run_folder: str | Path, on_skip: Report | None = None, *, verify: integrity.Hashes = True,
                  messages: Messages = integrity.ALONE) -> Iterator[Path]:  # fmt: skip
    """A run's whole checkpoints, newest first, each verified when its turn comes.

    on_skip hears of each that is not whole; without it a warning is logged. verify=False checks only that all
    files are there with their sizes, and a set of names reads those files besides. messages: of the ranks that look
    together; each verifies a part, and all are given the same checkpoints and hear the same reasons.
    """
    report = on_skip or _log.warning
    done = set()
    # rank 0's view of the folder counts: on a network disk another machine's may lag behind
    found = messages.share([[step, str(path)] for step, path in steps_in(Path(run_folder) / "checkpoints")])[0]
    for step, name in found:
        if step in done:
            continue
        path = Path(name)
        hold = disk.Hold(path)  # not to be purged while it is read
        try:
            integrity.check(path, hashes=verify, messages=messages)
        except CheckpointError as error:
            report(f"passed over a checkpoint: {error}")
        else:
            done.add(step)
            yield path
        del hold


def whole_checkpoints(run_folder: str | Path, on_skip: Report | None = None) -> list[Path]:
    """All whole checkpoints of a run, newest first; every byte is read. resolve_checkpoint stops at the newest."""
    return list(iterate_whole(run_folder, on_skip))


def resolve_checkpoint(path: str | Path, on_skip: Report | None = None, *, verify: integrity.Hashes = True,
                       messages: Messages = integrity.ALONE) -> Path:  # fmt: skip
    """The checkpoint that `path` means: its folder, or a file of llama2.c's or PyTorch's.

    path: a run folder (its newest whole checkpoint, on_skip hearing of those passed over), a training
    checkpoint (verified), an exported or Hugging Face folder, a llama2.c .bin, or PyTorch's .pt, .pth, .bin, also
    as the ckpt.pt of the public v1 code's out_dir. messages:
    of the ranks that ask together and share the verification. Raises CheckpointError.
    """
    path = Path(path)
    try:
        return _resolve(path, on_skip, verify, messages)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _resolve(path: Path, on_skip: Report | None, verify: integrity.Hashes, messages: Messages) -> Path:
    if path.is_file():
        if path.suffix not in _FILES:
            raise CheckpointError(
                f"{path} is a file: give the folder it lies in (only llama2.c's .bin and PyTorch's .pt, .pth and .bin are "
                f"files)"
            )
        return path
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}: check the path")
    if (path / "checkpoints").is_dir():
        return _newest(path, on_skip, verify, messages)
    if path.name == "checkpoints" and steps_in(path):
        return _newest(path.parent, on_skip, verify, messages)
    if os.path.lexists(path / manifest.NAME) or os.path.lexists(path / "trainer.json"):
        try:
            integrity.check(path, hashes=verify, messages=messages)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; give the run's folder to use its newest whole checkpoint") from error
        return path
    if any(os.path.lexists(path / name) for name in ("config.json", "params.json")):
        return path
    if os.path.lexists(path / "ckpt.pt"):  # as the public v1 code leaves it in its out_dir
        return path / "ckpt.pt"
    files = [file.name for file in sorted(path.iterdir()) if file.suffix in _FILES and not file.name.startswith("tok")]
    remedy = "give a run folder, a training checkpoint, or an exported folder"
    if files:
        remedy = f"give its file {shown(files[0])} by name"
    raise CheckpointError(f"{path} holds no checkpoint: it has neither config.json nor a folder checkpoints; {remedy}")


def _newest(run_folder: Path, on_skip: Report | None, verify: integrity.Hashes, messages: Messages) -> Path:
    skipped: list[str] = []

    def note(sentence: str) -> None:
        skipped.append(sentence)
        (on_skip or _log.warning)(sentence)

    newest = next(iterate_whole(run_folder, note, verify=verify, messages=messages), None)
    if newest is None:
        why = f": {'; '.join(skipped)}" if skipped else ": let the run reach its first one"
        raise CheckpointError(f"the run {run_folder} has no whole checkpoint{why}")
    return newest

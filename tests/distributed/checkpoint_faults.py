"""What can befall the checkpoints of a run between two sessions, caused on a real run folder.

Each fault has a name and a function `cause(run_folder)` that strikes the newest checkpoint. fault_table.py stops a run,
strikes, resumes, and compares the end with the unbroken run; tests/checkpoint/test_sharded.py asks what is found.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VICTIM = "pickle-was-run"
"""The folder that a planted pickle would make in the run's folder."""


@dataclass(frozen=True)
class CheckpointFault:
    name: str
    cause: Callable[[Path], None]
    """Strikes the run folder's newest checkpoint."""
    said: str | None
    """What a resumed run says of it; None: nothing that bears a checkpoint's name is damaged."""


def newest_checkpoint(run_folder: Path) -> Path:
    """The folder of the newest checkpoint, whole or not."""
    folders = [path for path in (run_folder / "checkpoints").iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return max(folders, key=lambda path: int(path.name.removeprefix("step-")))


def shard(run_folder: Path, part: str = "optimizer") -> Path:
    """The last rank's file of the newest checkpoint."""
    return max(newest_checkpoint(run_folder).glob(f"{part}*.safetensors"))


def flipped_bit(run_folder: Path) -> None:
    path = shard(run_folder, "model")
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 0x10
    path.write_bytes(data)


def truncated_shard(run_folder: Path) -> None:
    os.truncate(shard(run_folder), shard(run_folder).stat().st_size // 2)


def missing_shard(run_folder: Path) -> None:
    shard(run_folder).unlink()


def missing_manifest(run_folder: Path) -> None:
    (newest_checkpoint(run_folder) / "manifest.json").unlink()


def missing_index(run_folder: Path) -> None:
    (newest_checkpoint(run_folder) / "shards.json").unlink()


def bent_index(run_folder: Path) -> None:
    """shards.json sends a reader outside the folder; its size stays, so that only its hash tells."""
    path = newest_checkpoint(run_folder) / "shards.json"
    text = path.read_text()
    name = json.loads(text)["model"]["lm_head.weight"]["pieces"][0]["file"]
    path.write_text(text.replace(name, "../" + name[3:]))


def shards_of_another_step(run_folder: Path) -> None:
    """A rank's file of the checkpoint before, under the same name and of the same size."""
    file, last = shard(run_folder, "model"), newest_checkpoint(run_folder)
    others = sorted(path for path in (run_folder / "checkpoints").glob("step-*") if path != last and path.is_dir())
    shutil.copyfile(others[-1] / file.name, file)


def unfinished_save(run_folder: Path) -> None:
    """The newest checkpoint as a killed writer leaves it: under its temporary name, without a manifest."""
    path = newest_checkpoint(run_folder)
    (path / "manifest.json").unlink()
    shard(run_folder).unlink()
    path.rename(path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}"))


def stale_folder(run_folder: Path) -> None:
    """Half of a later checkpoint, left by a writer that was killed."""
    path = newest_checkpoint(run_folder)
    step = int(path.name.removeprefix("step-")) + 5
    shutil.copytree(path, path.with_name(f"step-{step:06d}.tmp-{uuid.uuid4().hex}"), ignore=lambda *_: ["manifest.json"])


def files_of_another_world(run_folder: Path) -> None:
    file = shard(run_folder, "model")
    shutil.copyfile(file, file.with_name("model-rank00003-of-00003.safetensors"))
    shutil.copyfile(file, file.with_name("model.safetensors"))


class _Payload:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def planted_pickle(run_folder: Path) -> None:
    """What PyTorch's own distributed checkpoints would run when they are opened."""
    for name in (".metadata", "__0_0.distcp", "optimizer.pt", "model.pt"):
        (newest_checkpoint(run_folder) / name).write_bytes(pickle.dumps(_Payload((run_folder / VICTIM).absolute())))


FAULTS = (
    CheckpointFault("a flipped bit in a shard", flipped_bit, "was altered"),
    CheckpointFault("a shard cut short", truncated_shard, "bytes of"),
    CheckpointFault("a shard missing", missing_shard, "is missing"),
    CheckpointFault("the manifest missing", missing_manifest, "manifest.json is missing"),
    CheckpointFault("the index of the shards missing", missing_index, "shards.json is missing"),
    CheckpointFault("an index that points outside", bent_index, "shards.json was altered"),
    CheckpointFault("a shard of another step", shards_of_another_step, "was altered"),
    CheckpointFault("an unfinished asynchronous save", unfinished_save, None),
    CheckpointFault("a stale temporary folder", stale_folder, None),
    CheckpointFault("files of another number of ranks", files_of_another_world, None),
    CheckpointFault(".metadata that carries a pickle payload", planted_pickle, None),
)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of `size` (as mount's tmpfs takes it) at `folder`. Raises OSError where that needs rights."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise OSError("a small tmpfs cannot be mounted here: that needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path, size: str) -> None:
    """Give the small disk room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)

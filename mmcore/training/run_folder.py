"""The folder of a run: what it is, what it saw, what it wrote.

```
recipe.yaml        the resolved recipe, every default spelled out
environment.json   versions, processor, GPU, git commit, command line; earlier sessions of the run below
data.json          the data's fingerprint
tokenizer/         the tokenizer's files
metrics.jsonl      one line a step, one a validation
health.jsonl       what the memories have become, every so often
tensorboard/       the same numbers
logs/              what each rank of several said, and its stacks where it hung
profile/           traces, where they were asked for
checkpoints/       step-000123/, whole or absent
```
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from mmcore import __version__
from mmcore.checkpoint import disk
from mmcore.checkpoint.resolve import steps_in
from mmcore.config import Recipe, build_recipe
from mmcore.errors import NO_ROOM, CheckpointError, ConfigError, HardwareError

# A resumed run may change these: they decide what is written and where it runs, not what is computed
FREE_KEYS = frozenset(
    {
        "name",
        "data.cache",
        "data.workers",
        "training.steps",
        "training.tokens",
        "training.log_every",
        "training.validation_every",
        "training.validation_tokens",
        "training.device",
        "training.micro_batch_size",
        "training.compile",
        "training.on_nonfinite",
        "training.max_skipped_steps",
        "training.spike_rollback",
        "training.health_every",
        "training.wandb",
    }
)
FREE_SECTIONS = ("checkpoint.", "distributed.", "training.spike_rollback.")
TUNED_KEYS = ("training.learning_rate", "training.warmup_steps", "training.gradient_clip", "training.precision")
"""What a run that diverges is mended with (faults.py names them): a resumed run may change these too, and says so."""
TENSORBOARD_FILES = "events.out.tfevents.*"
_ROUNDING = ("training.device", "training.micro_batch_size", "training.compile", "distributed.")


@contextlib.contextmanager
def room_errors(path: Path) -> Iterator[None]:
    """Turn into one sentence, whose remedy goes on with the run, that there is no room at `path` or where the error says."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        if error.errno == errno.EFBIG:
            raise HardwareError(
                f"{place} may not grow further: raise the limit on the size of files (ulimit -f), or choose another disk, "
                f"and go on with --resume"
            ) from None
        if error.errno in NO_ROOM:
            raise HardwareError(f"the disk is full at {place}: free some space and go on with --resume") from None
        raise


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into one sentence that names `path` and the remedy."""
    try:
        with room_errors(path):
            yield
    except PermissionError:
        raise ConfigError(f"no permission to write {path}: choose another folder with --set checkpoint.folder=") from None
    except FileNotFoundError:
        raise ConfigError(
            f"{path} cannot be written, since a folder on the way to it is gone: put it back and go on with --resume, or "
            f"choose another checkpoint.folder"
        ) from None
    except OSError as error:
        if error.errno in (errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            raise ConfigError(f"cannot write {path} ({error.strerror}): choose another checkpoint.folder") from None
        raise


class RunFolder:
    """Paths of a run, and the small files that say what it is."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.health = path / "health.jsonl"
        self.tensorboard = path / "tensorboard"
        self.tokenizer = path / "tokenizer"
        self.recipe = path / "recipe.yaml"

    def holds_checkpoints(self) -> bool:
        """Whether there is any, whole or not."""
        return bool(steps_in(self.checkpoints))

    def refuse_if_used(self) -> None:
        """Raise ConfigError where an earlier run left checkpoints: they are never overwritten unasked."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file: choose another run folder with --set checkpoint.folder=")
        if self.holds_checkpoints():
            raise ConfigError(
                f"{self.path} already holds checkpoints: go on with --resume, start over with --overwrite, "
                f"or choose another folder with --set checkpoint.folder="
            )

    def check_writable(self) -> None:
        """Raise ConfigError where the folder or its checkpoints cannot be written, without leaving anything behind."""
        for path in (self.path, self.checkpoints):
            existing = path
            while not os.path.lexists(existing) and existing != existing.parent:
                existing = existing.parent
            if not existing.is_dir():
                what = "a link to nothing" if not existing.exists() else "not a folder"
                raise ConfigError(f"{existing} is {what}: choose another run folder with --set checkpoint.folder=")
            if not os.access(existing, os.W_OK | os.X_OK):
                raise ConfigError(f"no permission to write {path}: choose another folder with --set checkpoint.folder=")

    def lock(self) -> IO[str]:
        """Keep other processes from training in this folder until the returned file is closed (or the process ends).

        Raises ConfigError where another one does. A file system without locks goes unprotected.
        """
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"another process is training in {self.path}: wait for it, or choose another checkpoint.folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        return file

    def clear(self) -> None:
        """Remove what a run writes, and nothing else that may lie in the folder."""
        from mmcore.checkpoint.formats.folder import TOKENIZER_FILES

        with disk_errors(self.path):
            remove(self.checkpoints, "step-*")
            remove(self.tensorboard, TENSORBOARD_FILES)
            remove(self.tokenizer, *TOKENIZER_FILES)
            for name in ("metrics.jsonl", "health.jsonl", "wandb-id", "recipe.yaml", "environment.json", "data.json"):
                (self.path / name).unlink(missing_ok=True)

    def write_identity(self, recipe: Recipe, fingerprint: dict[str, Any]) -> None:
        """Write recipe.yaml, environment.json and data.json; earlier environments are kept in the new one."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            replace_text(self.recipe, recipe_text(recipe))
            replace_text(self.path / "data.json", json.dumps(fingerprint, indent=2, sort_keys=True) + "\n")
            here = self.path / "environment.json"
            current = environment()
            if here.exists():
                current["earlier"] = _sessions(here.read_text(encoding="utf-8", errors="replace"))
            replace_text(here, json.dumps(current, indent=2) + "\n")


def remove(folder: Path, *written: str) -> None:
    """Remove a folder of the run. Of one that is a link, to a larger disk say, the link and whatever else lies there
    stay: only the entries that match one of `written` go. Raises OSError."""
    if not folder.is_symlink():
        if folder.exists():
            shutil.rmtree(folder)
        return
    for entry in [entry for pattern in written for entry in folder.glob(pattern)]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sessions(text: str) -> list[dict[str, Any]]:
    """The sessions that environment.json tells of, the last one at the end. It is a log, and no run ends because a crash
    cut it short: what cannot be read is kept as it is."""
    try:
        last = json.loads(text)
        return [*last.pop("earlier", []), last]
    except (ValueError, TypeError, AttributeError):
        return [{"unreadable": text}] if text.strip() else []


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML, its sections in the order of the house."""
    return yaml.safe_dump(recipe.as_dict(), sort_keys=False, allow_unicode=True)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, or leave the one that is there; on return the new one is on the disk. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave an empty file under the name
    os.replace(temporary, path)
    disk.sync_folder(path.parent)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "rope_scaling":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def check_same_recipe(before: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> list[str]:
    """Compare the recipe a checkpoint was made with to the one to go on with (both as `Recipe.as_dict`).

    Returns notices about changes that are allowed. Raises CheckpointError that names every other changed key
    with both values.
    """
    old, new = _flat(_completed(before)), _flat(now)
    changed = {key: (old.get(key), new.get(key)) for key in [*old, *new] if old.get(key) != new.get(key)}
    free = FREE_KEYS.union(TUNED_KEYS)
    barred = [key for key in changed if key not in free and not key.startswith(FREE_SECTIONS)]
    if barred:
        words = "; ".join(f"{key} was {changed[key][0]!r} and is now {changed[key][1]!r}" for key in barred)
        raise CheckpointError(
            f"cannot resume {checkpoint} with another recipe ({words}): set them back, or start a new run with "
            f"another checkpoint.folder"
        )
    notices = [f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in TUNED_KEYS if key in changed]
    if {"training.steps", "training.tokens"} & set(changed) and new.get("training.schedule") == "cosine":
        was, now_is = _length(old), _length(new)
        notices.append(f"the run's length changes from {was} to {now_is}: the cosine now ends there")
    rounding = [key for key in changed if key.startswith(_ROUNDING)]
    if rounding:
        notices.append(f"{', '.join(rounding)} changed: sums round differently, so losses agree but not bit for bit")
    return notices


def _completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as an earlier version wrote it, with the keys that came since at their defaults: what it computed then."""
    try:
        return build_recipe(recipe).as_dict()
    except ConfigError:  # it holds what this version does not know, which the comparison names
        return recipe


def _length(flat: dict[str, Any]) -> str:
    if flat.get("training.steps") is not None:
        return f"{flat['training.steps']} steps"
    return f"{flat.get('training.tokens'):.4g} tokens"


def environment() -> dict[str, Any]:
    """Where and with what this process runs, as plain values."""
    import psutil
    import torch

    versions = {}
    for package in ("torch", "numpy", "safetensors", "sentencepiece", "tokenizers", "typer", "rich", "pyyaml"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "mm": __version__,
        "git": _git_commit(),
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.platform(),
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def cpu_model() -> str:
    """The processor's name where Linux tells it, else its kind."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> dict[str, Any] | None:
    """The commit of the code that runs, where it runs from a git checkout of this project; else None."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str | None:
        try:
            command = ["git", "-C", str(root), *words]
            result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "mmcore/__init__.py") is None:
        return None
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}

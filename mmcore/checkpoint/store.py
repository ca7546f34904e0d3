"""Training checkpoints: `<run>/checkpoints/step-000123/`, whole or absent.

A checkpoint is an exported folder (config.json, safetensors with the contract's names, tokenizer files) with
optimizer.safetensors, trainer.json and recipe.yaml beside it, and manifest.json written last. Where several ranks
saved it, the tensors lie in their files by rows, and shards.json says which (sharded.py). It is written under a
temporary name, synced and renamed (writer.py, disk.py); only then are older ones removed. Nothing is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmcore.checkpoint import disk, integrity, manifest, sharded, tensorfile, untrusted
from mmcore.checkpoint.contents import MOMENTS, STATE, check_optimizer
from mmcore.checkpoint.formats.folder import open_folder
from mmcore.checkpoint.resolve import resolve_checkpoint, whole_checkpoints
from mmcore.checkpoint.rows import read_into, rows_of
from mmcore.checkpoint.tensorfile import LazyTensors, TensorFiles
from mmcore.checkpoint.writer import CheckpointWriter
from mmcore.config import ModelConfig
from mmcore.distributed.mesh import World
from mmcore.errors import CheckpointError


def save_checkpoint(
    run_folder: str | Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    files: Mapping[str, bytes | Path] | None = None,
    keep_last: int = 2,
    keep_every: int = 0,
    protect: Iterable[str | Path] = (),
    shard_bytes: int = tensorfile.SHARD_BYTES,
) -> Path:
    """Save step `step` of a run from one process, and return when it is there (see CheckpointWriter.save).

    Checkpoints that are older than the newest `keep_last` are removed (see retention.purge). Returns the folder,
    whose every byte is on the disk. Raises CheckpointError for weights that are not finite or do not fit the
    configuration, and for a disk that is full or cannot be written; then nothing has changed. A checkpoint that has
    the step already stays until the new one is whole.
    """
    writer = CheckpointWriter(run_folder, World(), keep_last=keep_last, keep_every=keep_every, asynchronous=False,
                              shard_bytes=shard_bytes)  # fmt: skip
    writer.save(step, model=model, optimizer=optimizer, state=state, config=config, files=files, protect=protect)
    path = writer.wait()
    assert path is not None, "a save that waits has published or raised"
    return path


@dataclass(frozen=True)
class TrainingState:
    """A training checkpoint read back. Weights and moments are read from disk when they are asked for."""

    path: Path
    step: int
    state: dict[str, Any]
    """trainer.json."""
    config: ModelConfig
    config_json: dict[str, Any]
    model: LazyTensors
    optimizer: LazyTensors
    """Empty in a checkpoint of the model alone."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop-1 of a weight, or of a moment (`exp_avg.<name>`); no other rows are read."""
        return rows_of(self._holding(name), name, start, stop)

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target`, plain or sharded by rows, with this rank's rows of a weight or a moment."""
        read_into(target, self._holding(name), name)

    def _holding(self, name: str) -> LazyTensors:
        return self.optimizer if name.partition(".")[0] in MOMENTS else self.model


def load_state(path: str | Path, *, verify: bool = False) -> TrainingState:
    """Open a training checkpoint to go on from, whatever the number of ranks that wrote it.

    verify=True reads and compares every byte first; whole_checkpoints and resolve_checkpoint have done so for the
    folders that they return. Raises CheckpointError.
    """
    folder = Path(path)
    if not os.path.lexists(folder / manifest.NAME):
        raise CheckpointError(f"{folder} is no training checkpoint (it has no {manifest.NAME}): give a step of a run")
    hold = disk.Hold(folder)
    records = integrity.check(folder, hashes=verify)
    checkpoint = open_folder(folder, verify=False)
    state = untrusted.read_json(folder / STATE)
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{folder / STATE} says no step: go back to an earlier checkpoint")
    files = _optimizer_files(folder, records)
    shapes = {name: spec.shape for name, spec in files.specs.items()}
    check_optimizer(checkpoint.config, shapes, f"{folder}: the optimizer", files.problems)
    return TrainingState(
        path=folder,
        step=step,
        state=state,
        config=checkpoint.config,
        config_json=checkpoint.config_json,
        model=checkpoint.tensors,
        optimizer=tensorfile.lazy_tensors(files, list(files.specs), folder, hold=hold),
    )


def _optimizer_files(folder: Path, records: integrity.Records) -> TensorFiles:
    if sharded.NAME in records:
        return sharded.find_pieces(folder, "optimizer", records)
    if any(name.startswith("optimizer") for name in records):
        return tensorfile.find_tensors(folder, "optimizer", records)
    return TensorFiles({}, {}, [])


__all__ = ["CheckpointWriter", "TrainingState", "load_state", "resolve_checkpoint", "save_checkpoint", "whole_checkpoints"]

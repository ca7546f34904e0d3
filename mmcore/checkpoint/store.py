"""Training checkpoints: `<run>/checkpoints/step-000123/`, whole or absent.

A checkpoint is an exported folder (config.json, safetensors with the contract's names, tokenizer files) with
optimizer.safetensors, trainer.json and recipe.yaml beside it, and manifest.json written last. It is written under
a temporary name, synced and renamed (disk.py); only then are older ones removed. Nothing is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmcore.checkpoint import disk, manifest, tensorfile, untrusted
from mmcore.checkpoint.disk import FileRecord
from mmcore.checkpoint.formats.folder import copied, open_folder
from mmcore.checkpoint.formats.modelconfig import config_from, generation_config_json
from mmcore.checkpoint.names import check_tensors, expected_tensors
from mmcore.checkpoint.resolve import resolve_checkpoint, steps_in, whole_checkpoints
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.checkpoint.untrusted import shown
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError

STATE = "trainer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two running averages; stored as `<moment>.<name of the weight>`."""

_OWN_FILES = {"config.json", STATE, manifest.NAME}


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
    protect: Iterable[str | Path] = (),
    shard_bytes: int = tensorfile.SHARD_BYTES,
) -> Path:
    """Save step `step` of a run and remove the checkpoints that are older than the newest `keep_last`.

    model: contract names -> weights, all that `config` (config.json's values; dtype is set here) implies.
    optimizer: `exp_avg.<name>` and `exp_avg_sq.<name>` -> tensors of the weight's shape. state: plain values for
    trainer.json. files: further files by name (recipe.yaml, tokenizer.model ...), as bytes or paths to copy.
    keep_last=0 keeps all; `protect` (the checkpoint resumed from) is never removed.

    Returns the folder, whose every byte is on the disk. Raises CheckpointError for weights that are not finite or
    do not fit the configuration, and for a disk that is full or cannot be written; then nothing has changed. A
    checkpoint that has the step already stays until the new one is whole.
    """
    checkpoints = Path(run_folder).absolute() / "checkpoints"
    target = checkpoints / manifest.folder_name(step)
    settings = config_from(dict(config), "the configuration to save")
    check_tensors(settings, {name: tuple(tensor.shape) for name, tensor in model.items()}, "the model to save")
    _check_optimizer(settings, {name: tuple(tensor.shape) for name, tensor in optimizer.items()}, "the optimizer")
    texts = _own_texts(step, state, config, model) | dict(files or {})
    with disk.writing(target, "earlier checkpoints are untouched"):
        disk.make_folders(checkpoints)
        disk.recover(checkpoints, lambda name: name.startswith("step-"))
        with disk.new_folder(target) as folder:
            records = copied(folder, texts)
            records |= _write(folder, "model", {name: model[name] for name in expected_tensors(settings)}, shard_bytes)
            records |= _write(folder, "optimizer", optimizer, shard_bytes)
            manifest.write_manifest(folder, step, records)
    _purge(checkpoints, target, keep_last, {Path(path).absolute().name for path in protect})
    return target


def _own_texts(step: int, state: Mapping[str, Any], config: Mapping[str, Any],
               model: Mapping[str, Tensor]) -> dict[str, bytes | Path]:  # fmt: skip
    """The JSON files that every checkpoint has."""
    dtype = next(iter(model.values())).dtype
    values = dict(config) | {"dtype": tensorfile.dtype_name(dtype)}
    try:
        return {
            "config.json": disk.json_bytes(values),
            "generation_config.json": disk.json_bytes(generation_config_json(values)),
            STATE: disk.json_bytes(dict(state) | {"step": step}),
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the trainer's state cannot be written as JSON ({error}): nothing was saved") from error


def _write(folder: Path, stem: str, tensors: Mapping[str, Tensor], shard_bytes: int) -> dict[str, FileRecord]:
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return tensorfile.write_tensors(folder, stem, tensors, specs, shard_bytes)


def _purge(checkpoints: Path, newest: Path, keep_last: int, protected: set[str]) -> None:
    """Remove checkpoints older than `newest` so that `keep_last` remain, itself counted, and not the protected.

    Later steps (left by a run that was resumed from an earlier one) stay, and folders that lack files are not
    counted as kept: what remains can be resumed from.
    """
    if keep_last < 1:
        return
    kept, newest_step = 1, int(newest.name.removeprefix("step-"))
    for step, path in steps_in(checkpoints):
        if step >= newest_step or path.name in protected:
            continue
        if kept < keep_last:
            kept += _has_all_files(path)
            continue
        with disk.writing(path, f"{newest.name} was saved, but this older checkpoint could not be removed"):
            disk.remove_folder(path)


def _has_all_files(path: Path) -> bool:
    try:
        manifest.check(path, hashes=False)
    except CheckpointError:
        return False
    return True


@dataclass(frozen=True)
class TrainingState:
    """A training checkpoint read back. Weights and moments are read from disk when they are asked for."""

    path: Path
    step: int
    state: dict[str, Any]
    """trainer.json."""
    config: ModelConfig
    config_json: dict[str, Any]
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


def load_state(path: str | Path, *, verify: bool = False) -> TrainingState:
    """Open a training checkpoint to go on from.

    verify=True reads and compares every byte first; whole_checkpoints and resolve_checkpoint have done so for the
    folders that they return. Raises CheckpointError.
    """
    folder = Path(path)
    if not os.path.lexists(folder / manifest.NAME):
        raise CheckpointError(f"{folder} is no training checkpoint (it has no {manifest.NAME}): give a step of a run")
    records = manifest.check(folder, hashes=verify)
    checkpoint = open_folder(folder, verify=False)
    state = untrusted.read_json(folder / STATE)
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{folder / STATE} says no step: go back to an earlier checkpoint")
    files = tensorfile.find_tensors(folder, "optimizer", records)
    shapes = {name: spec.shape for name, spec in files.specs.items()}
    _check_optimizer(checkpoint.config, shapes, f"{folder}: the optimizer", files.problems)
    return TrainingState(
        path=folder,
        step=step,
        state=state,
        config=checkpoint.config,
        config_json=checkpoint.config_json,
        model=checkpoint.tensors,
        optimizer=tensorfile.lazy_tensors(files, list(files.specs), folder),
    )


def _check_optimizer(config: ModelConfig, found: Mapping[str, tuple[int, ...]], origin: str,
                     problems: Iterable[str] = ()) -> None:  # fmt: skip
    """Every moment belongs to a weight and has its shape, and no weight has only one of the two."""
    expected = expected_tensors(config)
    faults = list(problems)
    for name, shape in found.items():
        moment, _, weight = name.partition(".")
        if moment not in MOMENTS or weight not in expected:
            faults.append(f"{shown(name)} belongs to no weight")
        elif shape != expected[weight]:
            faults.append(f"{name} is {list(shape)} and must be {list(expected[weight])}")
        elif any(f"{other}.{weight}" not in found for other in MOMENTS):
            faults.append(f"{name} is without its other moment")
    if faults:
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(faults)}")


__all__ = ["TrainingState", "load_state", "resolve_checkpoint", "save_checkpoint", "whole_checkpoints"]

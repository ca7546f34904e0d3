"""What `mm convert` writes: an exported folder, a run that training goes on from, or one file of PyTorch's.

Each appears under its name whole, or not at all, after `certify` has read it back and agreed; the certificate lies
in the folder or beside the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmcore.checkpoint import certificate, disk, manifest, store, tensorfile
from mmcore.checkpoint.formats.base import Checkpoint, Reopened
from mmcore.checkpoint.formats.folder import check_export_dtype, copied, kept_word, may_replace, write_exported
from mmcore.checkpoint.formats.modelconfig import config_json, generation_config_json
from mmcore.checkpoint.formats.torchfile import is_torch_file, write_torch_file
from mmcore.checkpoint.names import CLASSIFIER, EMBEDDING, expected_tensors
from mmcore.checkpoint.resumable import resumable_folder
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.errors import CheckpointError, ConfigError

CONVERTED = "converted_from"
"""The key of trainer.json that marks weights from elsewhere: no update was made to them and no data were seen."""


@dataclass(frozen=True)
class Job:
    """One conversion."""

    source: Checkpoint
    target: Path
    """Absolute."""
    dtype: torch.dtype
    max_shard_bytes: int
    force: bool
    allow_nonfinite: bool
    key: str
    """Decides which interrupted conversion is gone on with."""
    files: Mapping[str, bytes | Path]
    """The tokenizer's."""
    extra_files: Mapping[str, bytes | Path]
    """What an exported folder holds beside the weights: tokenizer, settings and code as transformers needs them."""
    extra_config: Mapping[str, Any]
    """Keys laid over an exported folder's config.json."""
    progress: Callable[[int], None]
    """Hears of the bytes written."""
    certify: Callable[[Path], bytes]
    """Reads the finished result back and compares; returns the certificate. Raises CheckpointError."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(self.dtype, shape) for name, shape in expected_tensors(self.source.config).items()}

    @property
    def config_json(self) -> dict[str, Any]:
        """config.json of the result, the text's ends as the source has them."""
        ends = {key: self.source.config_json.get(key) for key in ("bos_token_id", "eos_token_id")}
        return config_json(self.source.config, self.dtype) | ends


def write_hf(job: Job) -> None:
    """An exported folder (contract 1); the baseline becomes a LlamaForCausalLM."""
    write_exported(
        job.target, job.source.config, job.source.tensors, dtype=job.dtype, files=job.extra_files,
        max_shard_bytes=job.max_shard_bytes, extra=job.extra_config, force=job.force, key=job.key,
        progress=job.progress, allow_nonfinite=job.allow_nonfinite,
        certify=lambda folder: {certificate.NAME: job.certify(folder)},
    )  # fmt: skip


def write_train(job: Job) -> None:
    """A run folder with one training checkpoint.

    A step of a run keeps its optimizer, recipe and position; weights from elsewhere become step 0, without moments,
    so that training begins at step 1 with fresh ones. The files hold whole tensors: any number of ranks reads them.
    """
    step, state, optimizer, more = training_parts(job.source)
    with disk.writing(job.target, kept_word(job.target)):
        disk.make_folders(job.target.parent)
        check_train_target(job.target, job.force)
        with resumable_folder(job.target, job.key, job.progress) as staging:
            folder = staging.path / "checkpoints" / manifest.folder_name(step)
            disk.make_folders(folder)
            options = {"staging": staging, "allow_nonfinite": job.allow_nonfinite}
            limit, moments = job.max_shard_bytes, getattr(optimizer, "specs", {})
            records = tensorfile.write_tensors(folder, "model", job.source.tensors, job.specs, limit, **options)
            records |= tensorfile.write_tensors(folder, "optimizer", optimizer, moments, limit, **options)
            records |= copied(folder, {
                "config.json": disk.json_bytes(job.config_json),
                "generation_config.json": disk.json_bytes(generation_config_json(job.config_json)),
                store.STATE: disk.json_bytes(state),
                **job.files,
                **more,
            })  # fmt: skip
            manifest.write_manifest(folder, step, records)
            copied(folder, {certificate.NAME: job.certify(folder)})
            for path in (folder, folder.parent):
                disk.sync_folder(path)


def training_parts(source: Checkpoint) -> tuple[int, dict[str, Any], Mapping[str, torch.Tensor], dict[str, Path]]:
    """Step, trainer.json, moments and further files that a checkpoint gives to training."""
    if source.format != "training":
        return 0, {"step": 0, CONVERTED: {"format": source.format, "path": str(source.path)}}, {}, {}
    saved = store.load_state(source.path)
    optimizer = Reopened(saved.optimizer.specs, lambda: store.load_state(source.path).optimizer)
    recipe = source.path / "recipe.yaml"
    return saved.step, saved.state, optimizer, {recipe.name: recipe} if recipe.is_file() else {}


def write_torch(job: Job) -> None:
    """One file: {"model": state dict, "config": config.json, "files": the tokenizer's files as uint8 tensors}."""
    values = {"config": job.config_json, "files": {name: _content(file) for name, file in job.files.items()}}
    aliases = {CLASSIFIER: EMBEDDING} if job.source.config.tie_word_embeddings else {}
    with disk.writing(job.target, kept_word(job.target)):
        disk.make_folders(job.target.parent)
        check_torch_target(job.target, job.force)
        with resumable_folder(job.target, job.key, job.progress, publish=_publish_file) as staging:
            file = staging.path / job.target.name
            write_torch_file(
                file, values, job.source.tensors, job.specs, aliases=aliases, staging=staging,
                allow_nonfinite=job.allow_nonfinite,
            )  # fmt: skip
            copied(staging.path, {certificate.path_of(file).name: job.certify(file)})


def _content(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _publish_file(temporary: Path, target: Path) -> None:
    """Move a file and its certificate out of their folder; an old certificate never stands beside a new file."""
    new, old = certificate.path_of(temporary / target.name), certificate.path_of(target)
    if os.path.lexists(old):
        os.unlink(old)
    os.rename(temporary / target.name, target)
    os.rename(new, old)
    disk.sync_folder(target.parent)
    os.rmdir(temporary)


def check_torch_target(target: Path, force: bool) -> None:
    """Raise CheckpointError where something of the user's would be lost, ConfigError for a name that misleads."""
    if target.suffix not in (".pt", ".pth"):
        raise ConfigError(f"--to torch writes one file: let its name end in .pt, and not be {target.name}")
    for path in (target, certificate.path_of(target)):
        if os.path.lexists(path):
            if path.is_symlink() or not path.is_file():
                raise CheckpointError(f"{path} is no file: choose another name")
            if not force:
                raise CheckpointError(f"{path} is there already: choose another name, or replace it with --force")
    if target.exists() and not is_torch_file(target):
        raise CheckpointError(f"{target} is no file of PyTorch's: choose another name")


def check_train_target(target: Path, force: bool) -> None:
    """Raise CheckpointError where something of the user's would be lost: a run that went on is never replaced."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target} is no folder: choose another name")
    entries = sorted(entry.name for entry in target.iterdir())
    if not entries:
        return
    if not force:
        raise CheckpointError(f"{target} is there already: choose another name, or replace it with --force")
    steps = sorted((target / "checkpoints").iterdir()) if entries == ["checkpoints"] else []
    if len(steps) != 1 or not (steps[0] / certificate.NAME).is_file():
        raise CheckpointError(f"{target} holds more than a converted checkpoint: choose another name")


TARGETS: dict[str, Callable[[Job], None]] = {"hf": write_hf, "train": write_train, "torch": write_torch}
"""--to -> how it is written."""


def check_target(to: str, target: Path, dtype: torch.dtype, force: bool) -> None:
    """What can be refused before anything is read. Raises CheckpointError, ConfigError."""
    check_export_dtype(dtype)
    check = {"hf": may_replace, "train": check_train_target, "torch": check_torch_target}[to]
    check(target, force)

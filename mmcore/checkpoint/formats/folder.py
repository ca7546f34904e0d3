"""Folders of safetensors: training checkpoints, exported mosaics, Hugging Face's Llama."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.checkpoint import disk, manifest, tensorfile, untrusted
from mmcore.checkpoint.formats.base import WEIGHT_DTYPES, Checkpoint
from mmcore.checkpoint.formats.modelconfig import config_json, generation_config_json, read_config
from mmcore.checkpoint.names import check_tensors, expected_tensors
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.checkpoint.untrusted import shown
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_EXPORT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def open_folder(folder: Path, *, verify: bool = True, allow_nonfinite: bool = False) -> Checkpoint:
    """A checkpoint from a folder with config.json and safetensors, its names and shapes checked.

    A training checkpoint's files are first compared with its manifest, byte for byte unless verify is False.
    Raises CheckpointError.
    """
    training = os.path.lexists(folder / manifest.NAME)
    records = manifest.check(folder, hashes=verify) if training else None
    config, values = read_config(folder)
    _refuse_pickle(folder)
    files = tensorfile.find_tensors(folder, "model", records)
    problems = files.problems + [
        f"{shown(name)} is {tensorfile.dtype_name(spec.dtype)}, which is no dtype for weights"
        for name, spec in files.specs.items()
        if spec.dtype not in WEIGHT_DTYPES
    ]
    names = check_tensors(config, {name: spec.shape for name, spec in files.specs.items()}, folder, problems)
    kind = "training" if training else "hf-llama" if config.model_type == "llama" else "exported"
    return Checkpoint(
        format=kind,
        path=folder,
        config=config,
        config_json=values,
        tensors=tensorfile.lazy_tensors(files, names, folder, allow_nonfinite),
        weight_files=tuple(sorted(set(files.places.values()))),
        tokenizer_path=folder if any((folder / name).is_file() for name in _VOCABULARIES) else None,
        dtype=max((files.specs[name].dtype for name in names), key=lambda dtype: -WEIGHT_DTYPES.index(dtype)),
    )


def _refuse_pickle(folder: Path) -> None:
    if any(os.path.lexists(folder / f"model.safetensors{end}") for end in ("", ".index.json")):
        return
    pickled = next((path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")), None)
    if pickled:
        raise CheckpointError(
            f"{folder} has {shown(pickled.name)} and no safetensors: pickled weights can run code and are never read; "
            f"save the model as safetensors"
        )
    raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json: get the weights")


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files in a folder, by name; links are refused when they are copied."""
    return {name: folder / name for name in TOKENIZER_FILES if os.path.lexists(folder / name)}


def copied(folder: Path, files: Mapping[str, bytes | Path]) -> dict[str, disk.FileRecord]:
    """Write further files of a checkpoint durably, from bytes or from other files. Raises OSError."""
    records = {}
    for name, source in files.items():
        if not untrusted.is_plain_name(name):
            raise CheckpointError(f"{shown(name)} cannot be a file of a checkpoint: use a plain file name")
        if isinstance(source, Path):
            untrusted.require_regular(source)
            with open(source, "rb") as file:
                records[name] = disk.write_file(folder / name, iter(lambda f=file: f.read(disk.CHUNK), b""))
        else:
            records[name] = disk.write_file(folder / name, [source])
    return records


def write_exported(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    tokenizer_files: Mapping[str, bytes | Path] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    extra: Mapping[str, Any] | None = None,
    force: bool = False,
    certify: Callable[[Path], Mapping[str, bytes]] | None = None,
) -> Path:
    """Write an exported checkpoint (the baseline as LlamaForCausalLM) in one step: whole or not at all.

    tensors: contract names -> weights; each is fetched once, in order, so a lazy mapping needs the memory of one.
    extra: keys laid over config.json, such as bos_token_id. certify: called with the finished folder before it
    gets its name; the files that it returns are stored too, and where it raises nothing is left.
    An existing `folder` is kept, or with force replaced once the new one is whole, provided that it holds a
    checkpoint and nothing else. Raises CheckpointError.
    """
    folder = Path(folder)
    if dtype not in _EXPORT_DTYPES:
        names = ", ".join(map(tensorfile.dtype_name, _EXPORT_DTYPES))
        raise CheckpointError(f"weights cannot be exported as {tensorfile.dtype_name(dtype)}: choose one of {names}")
    expected = expected_tensors(config)
    check_tensors(config, _shapes(tensors), "the model to export")
    values = config_json(config, dtype) | dict(extra or {})
    specs = {name: TensorSpec(dtype, shape) for name, shape in expected.items()}
    kept = "nothing was left behind" + (f", and {folder} is as it was" if folder.exists() else "")
    with disk.writing(folder, kept):
        folder = folder.absolute()
        disk.make_folders(folder.parent)
        disk.recover(folder.parent, lambda name: name == folder.name)
        _may_replace(folder, force)
        with disk.new_folder(folder) as temporary:
            disk.write_json(temporary / "config.json", values)
            disk.write_json(temporary / "generation_config.json", generation_config_json(values))
            copied(temporary, tokenizer_files or {})
            tensorfile.write_tensors(temporary, "model", tensors, specs, max_shard_bytes)
            if certify is not None:
                copied(temporary, certify(temporary))
    return folder


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes without reading the weights where the mapping is lazy."""
    specs = getattr(tensors, "specs", None)
    return {name: (specs[name].shape if specs else tuple(tensors[name].shape)) for name in tensors}


def _may_replace(folder: Path, force: bool) -> None:
    """Raise CheckpointError where something of the user's would be lost."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: choose another name")
    entries = list(folder.iterdir())
    if not entries:
        return
    if not force:
        raise CheckpointError(f"{folder} is there already: choose another name, or replace it with --force")
    exported = (folder / "config.json").is_file() and not (folder / manifest.NAME).exists()
    if not exported or any(not entry.is_file() for entry in entries):
        raise CheckpointError(f"{folder} holds more than an exported checkpoint: choose another name")

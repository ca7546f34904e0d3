"""Folders of safetensors: training checkpoints, exported mosaics, Hugging Face's Llama."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.checkpoint import disk, integrity, manifest, sharded, tensorfile, untrusted
from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.formats.modelconfig import config_json, generation_config_json, read_config
from mmcore.checkpoint.formats.statedict import VOCABULARIES, find_state_dicts, open_state_dict
from mmcore.checkpoint.names import EMBEDDING, check_tensors, expected_tensors, twin_of
from mmcore.checkpoint.resumable import resumable_folder
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.checkpoint.untrusted import shown
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
_EXPORTED = re.compile(
    r"config\.json|generation_config\.json|certificate\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    rf"|[a-z]+_memory_mosaics\.py|{'|'.join(map(re.escape, TOKENIZER_FILES))}"
)
"""The names of files that an export consists of: where there are others, the folder is not ours to replace."""
_EXPORT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def open_folder(folder: Path, *, verify: bool = True, allow_nonfinite: bool = False) -> Checkpoint:
    """A checkpoint from a folder with config.json and safetensors, its names and shapes checked.

    A training checkpoint's files are first compared with its manifest, byte for byte unless verify is False.
    Raises CheckpointError.
    """
    training = os.path.lexists(folder / manifest.NAME)
    hold = disk.Hold(folder) if training else None  # a run that goes on does not remove what is being read
    records = integrity.check(folder, hashes=verify) if training else None
    if not training and _is_state_dict(folder):
        return open_state_dict(folder, allow_nonfinite=allow_nonfinite)
    config, values = read_config(folder)
    if records is not None and sharded.NAME in records:
        files = sharded.find_pieces(folder, "model", records)
    else:
        files = tensorfile.find_tensors(folder, "model", records)
    problems = files.problems + [
        f"{shown(name)} is {tensorfile.dtype_name(spec.dtype)}, which is no dtype for weights"
        for name, spec in files.specs.items()
        if spec.dtype not in tensorfile.WEIGHT_DTYPES
    ]
    shapes = {name: spec.shape for name, spec in files.specs.items()}
    twin = twin_of(config, shapes)
    shapes.pop(twin, None)
    names = check_tensors(config, shapes, folder, problems)
    kind = "training" if training else "hf-llama" if config.model_type == "llama" else "exported"
    return Checkpoint(
        format=kind,
        path=folder,
        config=config,
        config_json=values,
        tensors=tensorfile.lazy_tensors(files, names, folder, allow_nonfinite, {EMBEDDING: twin} if twin else None, hold),
        weight_files=files.files,
        tokenizer_path=folder if any((folder / name).is_file() for name in VOCABULARIES) else None,
        dtype=max((files.specs[name].dtype for name in names), key=lambda dtype: -tensorfile.WEIGHT_DTYPES.index(dtype)),
    )


def _is_state_dict(folder: Path) -> bool:
    """Whether a folder has PyTorch's files and no safetensors. Raises CheckpointError where it has neither."""
    if any(os.path.lexists(folder / f"model.safetensors{end}") for end in ("", ".index.json")):
        return False
    if not find_state_dicts(folder):
        raise CheckpointError(f"{folder} has no model.safetensors and no model.safetensors.index.json: get the weights")
    return True


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
    files: Mapping[str, bytes | Path] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    extra: Mapping[str, Any] | None = None,
    force: bool = False,
    certify: Callable[[Path], Mapping[str, bytes]] | None = None,
    key: str | None = None,
    progress: Callable[[int], None] | None = None,
    allow_nonfinite: bool = False,
) -> Path:
    """Write an exported checkpoint (the baseline as LlamaForCausalLM) in one step: whole or not at all.

    tensors: contract names -> weights; each is fetched once, in order, so a lazy mapping needs the memory of one.
    files: further files by name, as bytes or paths to copy, such as the code that transformers needs.
    extra: keys laid over config.json, such as bos_token_id. certify: called with the finished folder before it
    gets its name; the files that it returns are stored too, and where it raises nothing is left. key: what a killed
    writer with the same key finished is not written again (resumable.py). progress hears of the bytes written.
    An existing `folder` is kept, or with force replaced once the new one is whole, provided that it holds a
    checkpoint and nothing else. Raises CheckpointError.
    """
    folder = Path(folder)
    check_export_dtype(dtype)
    expected = expected_tensors(config)
    check_tensors(config, _shapes(tensors), "the model to export")
    values = config_json(config, dtype) | dict(extra or {})
    specs = {name: TensorSpec(dtype, shape) for name, shape in expected.items()}
    with disk.writing(folder, kept_word(folder)):
        folder = folder.absolute()
        disk.make_folders(folder.parent)
        may_replace(folder, force)
        with resumable_folder(folder, key or uuid.uuid4().hex, progress) as staging:
            tensorfile.write_tensors(
                staging.path, "model", tensors, specs, max_shard_bytes, staging=staging, allow_nonfinite=allow_nonfinite
            )
            disk.write_json(staging.path / "config.json", values)
            settings = {"generation_config.json": disk.json_bytes(generation_config_json(values))}
            copied(staging.path, {**settings, **(tokenizer_files or {}), **(files or {})})
            if certify is not None:
                copied(staging.path, certify(staging.path))
    return folder


def check_export_dtype(dtype: torch.dtype) -> None:
    """Raise CheckpointError for a dtype that weights are not exported in."""
    if dtype not in _EXPORT_DTYPES:
        names = ", ".join(map(tensorfile.dtype_name, _EXPORT_DTYPES))
        raise CheckpointError(f"weights cannot be exported as {tensorfile.dtype_name(dtype)}: choose one of {names}")


def kept_word(target: Path) -> str:
    """What to say is still there when writing `target` fails."""
    return "nothing was left behind" + (f", and {target} is as it was" if os.path.lexists(target) else "")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes without reading the weights where the mapping is lazy."""
    specs = getattr(tensors, "specs", None)
    return {name: (specs[name].shape if specs else tuple(tensors[name].shape)) for name in tensors}


def may_replace(folder: Path, force: bool) -> None:
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
    found = {entry.name for entry in entries}
    more = sorted(entry.name for entry in entries if not (entry.is_file() and _EXPORTED.fullmatch(entry.name)))
    if more or "config.json" not in found or not any(name.startswith("model") for name in found):
        what = f"holds more than an exported checkpoint ({shown(more[0])})" if more else "is no exported checkpoint"
        raise CheckpointError(f"{folder} {what}: choose another name")

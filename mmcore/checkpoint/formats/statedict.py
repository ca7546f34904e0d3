"""State dicts in PyTorch's files: this project's names, Hugging Face's Llama's, or Meta's.

The tensors stand at the top or under "model" (also "state_dict", "module"); names may carry the prefixes that
wrappers add. The configuration is inside, under "config", or beside: config.json, or Meta's params.json. A folder
may hold one file, or the shards that `pytorch_model.bin.index.json` names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.checkpoint import tensorfile, untrusted
from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.formats.modelconfig import config_from, config_json
from mmcore.checkpoint.formats.torchfile import read_torch_file
from mmcore.checkpoint.names import EMBEDDING, check_tensors, hugging_face_name, meta_to_hugging_face, twin_of
from mmcore.checkpoint.tensorfile import LazyTensors, TensorSpec
from mmcore.checkpoint.untrusted import shown
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError

ENDINGS = (".pt", ".pth", ".bin")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
INDEX = "pytorch_model.bin.index.json"

_INSIDE = ("model", "state_dict", "model_state_dict", "module")
_PREFIX = re.compile(r"(?:module\.|_orig_mod\.)+")
_META_IGNORED = ("rope.freqs",)
_REMAP = 64 << 20
"""Bytes handed out before the file is mapped anew: the pages of a mapping count as memory until it goes."""


def open_state_dict(path: Path, *, allow_nonfinite: bool = False) -> Checkpoint:
    """A checkpoint from one file of tensors, or from a folder with one or with shards and their index.

    Nothing in the files is run. Raises CheckpointError.
    """
    files = _files(path)
    parts = [_Part(file) for file in files]
    folder = path if path.is_dir() else path.parent
    found, problems = _gather(parts)
    values, named_by_meta = _config(parts[0], folder, path, found)
    config = config_from(values, f"the config.json of {path}")
    names = _names(found, named_by_meta, problems)
    shapes = {name: found[raw].shape for name, raw in names.items()}
    twin = twin_of(config, shapes)
    shapes.pop(twin, None)
    expected = check_tensors(config, shapes, path, problems)
    readers = {
        name: partial(_read, found[names[name]].part, names[name], found[names[name]], name, config, named_by_meta)
        for name in [*expected, *([twin] if twin else [])]
    }
    specs = {name: TensorSpec(found[names[name]].dtype, found[names[name]].shape) for name in expected}
    widest = max((spec.dtype for spec in specs.values()), key=lambda d: -tensorfile.WEIGHT_DTYPES.index(d))
    inside = parts[0].files
    beside = folder if any((folder / name).is_file() for name in VOCABULARIES) else None
    return Checkpoint(
        format="torch",
        path=path,
        config=config,
        config_json=values,
        tensors=LazyTensors(readers, specs, path, allow_nonfinite, twins={EMBEDDING: twin} if twin else {}),
        weight_files=tuple(files),
        tokenizer_path=None if inside else beside,
        dtype=widest,
        files=inside,
    )


def find_state_dicts(folder: Path) -> list[Path]:
    """The files of PyTorch's in a folder, which must be one model's. Raises CheckpointError where that is unclear."""
    if os.path.lexists(folder / INDEX):
        return _indexed(folder / INDEX)
    found = sorted(path for path in folder.iterdir() if path.suffix in ENDINGS and path.name not in _NO_WEIGHTS)
    if len(found) > 1:
        names = ", ".join(shown(path.name) for path in found[:5])
        raise CheckpointError(
            f"{folder} holds {len(found)} PyTorch files ({names}) and no {INDEX}: give the one that is meant; a model "
            f"cut over several files by model parallelism must be joined first"
        )
    return found


_NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "rng_state.pth"}
"""What trainers leave beside a model's weights."""


def _files(path: Path) -> list[Path]:
    return find_state_dicts(path) if path.is_dir() else [path]


def _indexed(index: Path) -> list[Path]:
    weight_map = untrusted.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: get it again")
    for name, file in weight_map.items():
        if not untrusted.is_plain_name(file) or not file.endswith(ENDINGS):
            raise CheckpointError(
                f"{index} keeps {shown(name)} in {shown(str(file))}: a shard must be a plain file name in that folder"
            )
    return [index.parent / file for file in sorted(set(weight_map.values()))]


class _Part:
    """One file, mapped when it is needed and anew after every 64 MB read from it."""

    def __init__(self, path: Path):
        self.path = path
        self.size = untrusted.require_regular(path)
        content = read_torch_file(path)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds no dict of tensors: save the model's state_dict")
        self.place = next((key for key in _INSIDE if isinstance(content.get(key), Mapping)), None)
        self.config = content.get("config") if self.place else None
        self.files = _bytes_of(content.get("files")) if self.place else {}
        self._tensors: Mapping[Any, Any] | None = self._inner(content)
        self._read = 0

    def _inner(self, content: Mapping[Any, Any]) -> Mapping[Any, Any]:
        return content[self.place] if self.place else content

    def tensors(self) -> Mapping[Any, Any]:
        if self._tensors is None:
            self._tensors, self._read = self._inner(read_torch_file(self.path)), 0
        return self._tensors

    def take(self, name: str) -> Tensor:
        tensor = self.tensors().get(name)
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{self.path} changed while it was read: {shown(name)} is gone")
        self._read += tensor.nbytes
        if self._read > _REMAP:
            self._tensors = None
        return tensor.detach()


class _Found:
    """Where a tensor lies, and what it is."""

    def __init__(self, part: _Part, tensor: Tensor):
        self.part, self.dtype, self.shape = part, tensor.dtype, tuple(tensor.shape)


def _bytes_of(files: Any) -> dict[str, bytes]:
    """Files that were stored as uint8 tensors: the tokenizer's."""
    if not isinstance(files, Mapping):
        return {}
    return {
        name: value.numpy().tobytes()
        for name, value in files.items()
        if untrusted.is_plain_name(name) and isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1
    }


def _gather(parts: list[_Part]) -> tuple[dict[str, _Found], list[str]]:
    """All tensors by their names in the files, and what cannot be a model's."""
    found: dict[str, _Found] = {}
    problems = []
    for part in parts:
        for name, value in part.tensors().items():
            if not isinstance(name, str):
                problems.append(f"a tensor is called {shown(repr(name))}, which is no name")
            elif type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
                problems.append(f"{shown(name)} is a {type(value).__name__} and no plain tensor")
            elif value.dtype not in tensorfile.WEIGHT_DTYPES:
                problems.append(f"{shown(name)} is {tensorfile.dtype_name(value.dtype)}, which is no dtype for weights")
            elif value.nbytes > part.size or value.is_meta:
                problems.append(f"{shown(name)} is {list(value.shape)}, larger than its file")
            elif name in found:
                problems.append(f"{shown(name)} is in {found[name].part.path.name} and again in {part.path.name}")
            else:
                found[name] = _Found(part, value)
    return found, problems


def _names(found: Mapping[str, _Found], named_by_meta: bool, problems: list[str]) -> dict[str, str]:
    """The contract's name -> the name in the file; names given twice are added to `problems`."""
    names: dict[str, str] = {}
    for raw in found:
        name = _PREFIX.sub("", raw, count=1) if _PREFIX.match(raw) else raw
        if named_by_meta:
            if name in _META_IGNORED:
                continue
            try:
                name = hugging_face_name(name)
            except KeyError:
                pass  # reported as unexpected, by its own name
        if name in names:
            problems.append(f"{shown(name)} is there twice, as {shown(names[name])} and as {shown(raw)}")
        names.setdefault(name, raw)
    return names


def _read(part: _Part, raw: str, found: _Found, name: str, config: ModelConfig, named_by_meta: bool) -> Tensor:
    tensor = part.take(raw)
    if tensor.dtype != found.dtype or tuple(tensor.shape) != found.shape:
        raise CheckpointError(f"{part.path} changed while it was read: {shown(raw)} is no longer {list(found.shape)}")
    return meta_to_hugging_face(name, tensor, config) if named_by_meta else tensor


# -- the configuration -----------------------------------------------------------------------------------------


def _config(part: _Part, folder: Path, path: Path, found: Mapping[str, _Found]) -> tuple[dict[str, Any], bool]:
    """config.json's values from inside or beside the file, and whether the names are Meta's."""
    plain = {_PREFIX.sub("", name, count=1): item for name, item in found.items()}
    named_by_meta = "tok_embeddings.weight" in plain
    if isinstance(part.config, Mapping) and "model_type" in part.config:
        return dict(part.config), named_by_meta
    if os.path.lexists(folder / "config.json"):
        return untrusted.read_json(folder / "config.json"), named_by_meta
    if named_by_meta and os.path.lexists(folder / "params.json"):
        return _from_params(folder / "params.json", plain), True
    raise CheckpointError(
        f"{path} has no configuration: put the model's config.json {'(or params.json) ' * named_by_meta}into {folder}"
    )


def _from_params(path: Path, found: Mapping[str, _Found]) -> dict[str, Any]:
    """config.json's values from Meta's params.json; widths that it leaves open are those of the tensors."""
    params = untrusted.read_json(path)
    theta = params.get("rope_theta", 10_000.0)
    scaled = params.get("use_scaled_rope")
    inner = found.get("layers.0.feed_forward.w1.weight")
    values = {
        "model_type": "llama",
        "vocab_size": found["tok_embeddings.weight"].shape[0],
        "hidden_size": params.get("dim"),
        "intermediate_size": inner.shape[0] if inner and inner.shape else None,
        "num_hidden_layers": params.get("n_layers"),
        "num_attention_heads": params.get("n_heads"),
        "num_key_value_heads": params.get("n_kv_heads"),
        "rms_norm_eps": params.get("norm_eps"),
        "rope_theta": theta,
        "max_position_embeddings": params.get("max_seq_len", 131_072 if scaled else 8192 if theta == 500_000 else 4096),
        "tie_word_embeddings": "output.weight" not in found,
    }
    if scaled:
        values["rope_scaling"] = {
            "rope_type": "llama3", "factor": params.get("rope_scaling_factor", 8), "low_freq_factor": 1,
            "high_freq_factor": params.get("rope_high_freq_factor", 4), "original_max_position_embeddings": 8192,
        }  # fmt: skip
    dtype = found["tok_embeddings.weight"].dtype
    return {**config_json(config_from(values, str(path)), dtype), **values}

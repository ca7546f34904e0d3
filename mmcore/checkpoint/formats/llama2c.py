"""llama2.c's .bin files (karpathy/llama2.c, export version 0).

Seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; a negative vocab_size says that the
classifier is untied), then float32 arrays: each kind of weight for all layers at once, in Meta's layout (W_1, W_2,
W_3 are gate, down, up), then the two rotary tables, which follow from the header and are skipped, and the
classifier where it is untied.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmcore.checkpoint import untrusted
from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.names import check_tensors, expected_tensors, hugging_face_name, meta_to_hugging_face
from mmcore.checkpoint.tensorfile import LazyTensors, TensorSpec
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError, ConfigError

BOS, EOS = 1, 2
"""llama2.c always uses Llama 2's ids."""

_HEADER = struct.Struct("<7i")
_MAGIC = 0x616B3432  # "ak42": versions 1 and 2
_ORDER = ("tok_embeddings", "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
          "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "norm", "rotary tables",
          "output")  # fmt: skip


def open_llama2c(path: Path, *, allow_nonfinite: bool = False) -> Checkpoint:
    """A llama2.c model file. Its size must be what its header implies, to the byte. Raises CheckpointError."""
    size = untrusted.require_regular(path)
    config = _read_header(path, size)
    shapes = expected_tensors(config)
    offsets, end = _offsets(config, shapes)
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes and its header implies {end}: get the file again")
    readers = {name: partial(_read, path, offsets[name], name, shapes[name], config) for name in shapes}
    specs = {name: TensorSpec(torch.float32, shape) for name, shape in shapes.items()}
    check_tensors(config, shapes, path)
    return Checkpoint(
        format="llama2c",
        path=path,
        config=config,
        config_json=config_json(config, torch.float32, BOS, EOS),
        tensors=LazyTensors(readers, specs, path, allow_nonfinite),
        weight_files=(path,),
        tokenizer_path=_find_tokenizer(path, config.vocab_size),
        dtype=torch.float32,
    )


def _read_header(path: Path, size: int) -> ModelConfig:
    try:
        with open(path, "rb") as file:
            data = file.read(_HEADER.size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if len(data) < _HEADER.size:
        raise CheckpointError(f"{path} is too short for a llama2.c model: get the file again")
    dim, hidden, layers, heads, kv_heads, vocabulary, length = _HEADER.unpack(data)
    if dim == _MAGIC:
        raise CheckpointError(f"{path} is a newer llama2.c file (versions 1 and 2): export it as version 0")
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocabulary), length)
    # each layer has more than one weight of each row, so a file can have no more layers than bytes
    if min(sizes) < 1 or dim % heads or (dim // heads) % 2 or heads % kv_heads or layers * dim > size:
        raise CheckpointError(f"{path} is no llama2.c model: its header reads {', '.join(map(str, sizes))}")
    try:
        return ModelConfig(
            model_type="llama",
            vocab_size=abs(vocabulary),
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_word_embeddings=vocabulary > 0,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} is no llama2.c model: {error}") from error


def _offsets(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, int], int]:
    """Hugging Face's name -> where its float32 values begin; and where the file ends."""
    offsets, position = {}, _HEADER.size
    for kind in _ORDER:
        if kind == "rotary tables":
            position += 4 * 2 * config.max_position_embeddings * (config.head_size // 2)
            continue
        for name in _names(kind, config):
            if name in shapes:
                offsets[name] = position
                position += 4 * int(np.prod(shapes[name], dtype=object))
    return offsets, position


def _names(kind: str, config: ModelConfig) -> Iterator[str]:
    if kind in ("tok_embeddings", "norm", "output"):
        yield hugging_face_name(f"{kind}.weight")
        return
    for layer in range(config.num_hidden_layers):
        yield hugging_face_name(f"layers.{layer}.{kind}.weight")


def _read(path: Path, offset: int, name: str, shape: tuple[int, ...], config: ModelConfig) -> Tensor:
    try:
        values = np.fromfile(path, dtype="<f4", count=int(np.prod(shape)), offset=offset)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    if values.size != np.prod(shape):
        raise CheckpointError(f"{path} changed while it was read: get the file again")
    return meta_to_hugging_face(name, torch.from_numpy(values.reshape(shape)), config)


def _find_tokenizer(path: Path, vocab_size: int) -> Path | None:
    """tok<vocabulary>.bin or tokenizer.bin beside the model, as llama2.c names them."""
    beside = (path.parent / name for name in (f"tok{vocab_size}.bin", "tokenizer.bin"))
    return next((candidate for candidate in beside if candidate.is_file()), None)

"""Valid small files for the fuzzer, each in a folder of its own: what is read, and which of its files to spoil."""

from __future__ import annotations

import base64
import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmcore.checkpoint.formats import open_checkpoint, write_exported
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.load import model_from
from mmcore.checkpoint.store import load_state
from mmcore.checkpoint.tensorfile import find_tensors, lazy_tensors, read_header
from mmcore.config import ModelConfig, V1Config
from mmcore.data import load_tokenizer, train_sentencepiece
from mmcore.data.huggingface_tokenizer import _byte_letters
from tests.checkpoint import fuzz_mutations as mutations
from tests.checkpoint.small import LLAMA, MOSAIC, TIED, save, weights
from tests.helpers import v1_files
from tests.helpers.ranked import write_ranked

V1 = ModelConfig(model_type="memory_mosaics_v1", vocab_size=37, hidden_size=16, intermediate_size=5, num_hidden_layers=1,
                 num_attention_heads=2, tie_word_embeddings=True, v1=V1Config(variant="library", bias=True))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Target:
    """A reader, and a file that it reads."""

    name: str
    folder: Path
    file: str
    """Relative to the folder."""
    mutate: Callable[[Any, bytes], bytes]
    read: Callable[[Path], None]
    """Takes the folder; raises an MMError, or finds the model whole. Anything else is a defect."""
    share: float
    """Of all cases."""
    vouched: bool = False
    """Whether the manifest is made to name the spoiled file as it is, so that it is read at all."""


def build(root: Path) -> list[Target]:
    """All targets, their folders made in `root`."""
    targets = _safetensors(root) + _configs(root) + _training(root) + _llama2c(root) + _torch(root) + _tokenizers(root)
    shutil.copytree(root / "index", root / "outside", dirs_exist_ok=True)  # what an index must not reach
    return targets


# -- reading, and what must hold afterwards ----------------------------------------------------------------------


def _whole(tensors: Any) -> None:
    """Every tensor that was promised is there, of its shape and dtype, and its first number is finite."""
    for name in tensors:
        tensor = tensors[name]
        spec = tensors.specs[name]
        assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, name
        assert not tensor.numel() or not tensor.is_floating_point() or math.isfinite(tensor.flatten()[0]), name


def _read_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    specs = read_header(path)
    size = path.stat().st_size
    assert sum(spec.nbytes for spec in specs.values()) <= size
    assert all(isinstance(name, str) for name in specs)


def _read_tensors(folder: Path) -> None:
    files = find_tensors(folder, "model")
    assert all(path.parent == folder and path.is_file() and not path.is_symlink() for path in files.places.values())
    _whole(lazy_tensors(files, list(files.specs), folder))


def _open(name: str = "") -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        checkpoint = open_checkpoint(folder / name if name else folder)
        assert all(path.is_relative_to(folder) and not path.is_symlink() for path in checkpoint.weight_files)
        assert set(checkpoint.tensors) and checkpoint.config.num_hidden_layers <= len(checkpoint.tensors)
        _whole(checkpoint.tensors)

    return read


def _run(name: str = "") -> Callable[[Path], None]:
    """As far as a user would go: load the model, read two tokens."""
    def read(folder: Path) -> None:
        model = model_from(open_checkpoint(folder / name if name else folder))
        with torch.no_grad():
            logits = model(torch.tensor([[1, 2]]))
        assert logits.shape == (1, 2, model.config.vocab_size)

    return read


def _state(folder: Path) -> None:
    state = load_state(folder, verify=True)
    _whole(state.model)
    _whole(state.optimizer)


def _speak(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("Hello, wörld 12")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert isinstance(tokenizer.decode(ids), str) and len(tokenizer.token_bytes()) == tokenizer.vocab_size
    tokenizer.files()


# -- seeds -------------------------------------------------------------------------------------------------------


def _safetensors(root: Path) -> list[Target]:
    small = ModelConfig(vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2)
    header = write_exported(root / "header", small, weights(small))
    index = write_exported(root / "index", TIED, weights(TIED), max_shard_bytes=3000)
    shard = sorted(path.name for path in index.glob("model-*.safetensors"))[1]
    return [
        Target("safetensors header", header, "model.safetensors", mutations.mutate_safetensors, _read_header, 0.22),
        Target("safetensors tensors", header, "model.safetensors", mutations.mutate_safetensors, _read_tensors, 0.08),
        Target("safetensors index", index, "model.safetensors.index.json", mutations.mutate_json, _read_tensors, 0.10),
        Target("safetensors shard", index, shard, mutations.mutate_safetensors, _open(), 0.03),
    ]


def _configs(root: Path) -> list[Target]:
    found = []
    configs = {"mosaic": MOSAIC, "llama": LLAMA, "v1": V1}
    for name, config in configs.items():
        folder = write_exported(root / f"config-{name}", config, weights(config))
        if name == "llama":
            values = json.loads((folder / "config.json").read_text()) | {"rope_scaling": LLAMA3}
            (folder / "config.json").write_text(json.dumps(values))
        found.append(Target(f"config.json of {name}", folder, "config.json", mutations.mutate_json, _open(), 0.06))
    found.append(Target("config.json, model run", folder, "config.json", mutations.mutate_json, _run(), 0.005))
    return found


def _training(root: Path) -> list[Target]:
    tiny = ModelConfig(vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2)
    folder = save(root / "run", 3, config=tiny)
    vouched = {"trainer.json": mutations.mutate_json, "config.json": mutations.mutate_json,
               "optimizer.safetensors": mutations.mutate_safetensors}  # fmt: skip
    shards = _in_shards(folder, root / "shards" / folder.name)
    return [
        Target("shards.json", shards, "shards.json", mutations.mutate_json, _state, 0.05, True),
        Target("manifest.json", folder, "manifest.json", mutations.mutate_json, _state, 0.04),
        *(Target(f"training {file}", folder, file, mutate, _state, 0.01, True) for file, mutate in vouched.items()),
    ]


def _in_shards(source: Path, folder: Path) -> Path:
    """A checkpoint of one rank as two ranks would have written it, half of the rows each."""
    state = load_state(source)
    texts = {name: (source / name).read_bytes() for name in ("config.json", "trainer.json")}
    return write_ranked(folder, state.step, {"model": dict(state.model), "optimizer": dict(state.optimizer)}, 2, texts)


def _llama2c(root: Path) -> list[Target]:
    folder = root / "llama2c"
    folder.mkdir()
    _write_llama2c(folder / "model.bin")
    return [Target("llama2.c header", folder, "model.bin", _mutate_llama2c, _open("model.bin"), 0.12)]


def _write_llama2c(path: Path) -> None:
    """dim 4, one layer, two heads, five tokens."""
    dim, hidden, layers, heads, kv_heads, vocabulary, length = header = (4, 6, 1, 2, 1, 5, 8)
    count = vocabulary * dim + layers * (2 * dim + 2 * dim * dim + 2 * dim * (dim // heads * kv_heads) + 3 * dim * hidden) + dim
    rotary = 2 * length * (dim // heads // 2)
    path.write_bytes(struct.pack("<7i", *header) + struct.pack(f"<{count + rotary}f", *[0.01] * (count + rotary)))


def _mutate_llama2c(draw: Any, data: bytes) -> bytes:
    """Mostly the seven numbers of the header."""
    if draw.random() < 0.3:
        return mutations.mutate_bytes(draw, data)
    header = list(struct.unpack_from("<7i", data))
    for _ in range(draw.choice((1, 1, 2, 3))):
        number = draw.choice((*mutations.NUMBERS, 3, 4, 5, 6, -5, 10, 100, 1000, 1 << 20, 1 << 24))
        header[draw.randrange(7)] = (number + (1 << 31)) % (1 << 32) - (1 << 31)
    body = data[28:] + bytes(draw.choice((0, 0, 0, 4, 400)))
    return struct.pack("<7i", *header) + body


def _torch(root: Path) -> list[Target]:
    small = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 7, "pmem_size": 3, "block_size": 4}
    found = []
    for kind, share in (("nano", 0.04), ("eft", 0.03)):
        path = v1_files.save(root / f"torch-{kind}" / "ckpt.pt", kind, **small)
        found.append(Target(f"v1 {kind} .pt", path.parent, "ckpt.pt", mutations.mutate_torch, _open("ckpt.pt"), share))
    folder = root / "torch-state"
    folder.mkdir()
    tiny = ModelConfig(vocab_size=5, hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=2)
    torch.save({"model": weights(tiny), "config": config_json(tiny, torch.float32)}, folder / "model.pt")
    found.append(Target("state dict .pt", folder, "model.pt", mutations.mutate_torch, _open("model.pt"), 0.04))
    found.append(Target("v1 nano .pt, model run", root / "torch-nano", "ckpt.pt", mutations.mutate_torch, _run("ckpt.pt"), 0.005))
    return found


def _tokenizers(root: Path) -> list[Target]:
    texts = ["the cat sat on the mat and the dog ran to the man", "hello world, 12 34", "ab ba aab"] * 30
    sentencepiece = root / "tokenizer-sentencepiece"
    train_sentencepiece(texts, 300, sentencepiece)
    (sentencepiece / "tokenizer.json").unlink(missing_ok=True)
    letters = [_byte_letters()[byte] for byte in range(256)]
    rows = {letter: i for i, letter in enumerate(letters)} | {"th": 256, "the": 257, "<|endoftext|>": 258}
    gpt2, folder = root / "tokenizer-gpt2", root / "tokenizer-json"
    gpt2.mkdir()
    (gpt2 / "encoder.json").write_text(json.dumps(rows))
    (gpt2 / "vocab.bpe").write_text("#version: 0.2\nt h\nth e\n")
    load_tokenizer(gpt2).save(folder)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    values |= {"bos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    llama2c = root / "tokenizer-llama2c"
    llama2c.mkdir()
    pieces = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)), b" ", b"a", b"b", b" a", b"ab"]
    body = b"".join(struct.pack("<fi", -float(i), len(piece)) + piece for i, piece in enumerate(pieces))
    (llama2c / "tok264.bin").write_bytes(struct.pack("<I", 8) + body)
    tiktoken = root / "tokenizer-tiktoken"
    tiktoken.mkdir()
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)] + [base64.b64encode(b"th") + b" 256"]
    (tiktoken / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    blind = mutations.mutate_bytes
    return [
        Target("tokenizer.json", folder, "tokenizer.json", mutations.mutate_json, _speak, 0.05),
        Target("tokenizer_config.json", folder, "tokenizer_config.json", mutations.mutate_json, _speak, 0.03),
        Target("sentencepiece tokenizer.model", sentencepiece, "tokenizer.model", blind, _speak, 0.04),
        Target("llama2.c tokenizer", llama2c, "tok264.bin", blind, _speak, 0.02),
        Target("tiktoken tokenizer.model", tiktoken, "tokenizer.model", blind, _speak, 0.01),
        Target("GPT-2 encoder.json", gpt2, "encoder.json", mutations.mutate_json, _speak, 0.01),
        Target("GPT-2 vocab.bpe", gpt2, "vocab.bpe", blind, _speak, 0.01),
    ]

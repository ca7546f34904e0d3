"""Small models on disk: configurations, random tensors, and a saved step."""

from __future__ import annotations

import struct
from pathlib import Path

import torch
from torch import Tensor

from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.names import expected_tensors
from mmcore.checkpoint.store import save_checkpoint
from mmcore.config import ModelConfig
from mmcore.data.sentencepiece_model import from_llama2c

MOSAIC = ModelConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
LONG_SHORT = ModelConfig(model_type="long_short_transformer", vocab_size=37, hidden_size=16, intermediate_size=24,
                         num_hidden_layers=1, num_attention_heads=2)
LLAMA = ModelConfig(model_type="llama", vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2)
TIED = ModelConfig(model_type="llama", vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                   num_attention_heads=2, tie_word_embeddings=True)
ALL = {"mosaic": MOSAIC, "long-short": LONG_SHORT, "llama": LLAMA, "tied": TIED}

TOKENIZER = from_llama2c(
    struct.pack("<I", 8) + b"".join(
        struct.pack("<fi", 0.0, len(piece)) + piece
        for piece in [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256)), b" ", b"a"]
    )
).file_bytes  # fmt: skip
"""A sentencepiece model that knows a space, an a, and bytes."""


def weights(config: ModelConfig = MOSAIC, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).mul_(0.1).to(dtype)
        for name, shape in expected_tensors(config).items()
    }


def moments(model: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{moment}.{name}": torch.randn(tensor.shape, generator=generator)
        for moment in ("exp_avg", "exp_avg_sq")
        for name, tensor in model.items()
    }


def save(run: Path, step: int, *, config: ModelConfig = MOSAIC, seed: int | None = None, **options) -> Path:
    """Save a step whose weights follow from `seed` (the step by default)."""
    model = weights(config, step if seed is None else seed)
    arguments = dict(
        model=model,
        optimizer=moments(model, step),
        state={"position": 1000 * step, "loss": 1.5},
        config=config_json(config, torch.float32, 1, 2),
        files={"recipe.yaml": b"name: test\n", "tokenizer.model": TOKENIZER},
        keep_last=0,
    )
    return save_checkpoint(run, step, **(arguments | options))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)

"""A recipe that trains in seconds: two layers of 32, text made up from a few hundred words."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from mmcore.config import Recipe, build_recipe


def write_text(path: Path, documents: int = 120, seed: int = 0) -> Path:
    """Documents of made-up sentences, divided as TinyStories is."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("aeioubcdfglmnprst") for _ in range(draw.randint(2, 7))) for _ in range(300)]
    texts = []
    for _ in range(documents):
        sentences = (" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(draw.randint(3, 12)))
        texts.append(". ".join(sentences).capitalize() + ".\n")
    path.write_text("<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


def tiny_values(folder: Path, **training: Any) -> dict[str, Any]:
    """The recipe's values; its text, shards and run all lie in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return {
        "name": "tiny",
        "model": {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "short_term_window": 16,
            "long_term_delay": 4,
            "long_term_delay_range": [4, 16],
        },
        "data": {
            "sources": [{"path": str(text)}],
            "validation_fraction": 0.05,
            "cache": str(folder / "cache"),
            "workers": 1,
        },
        "training": {
            "sequence_length": 64,
            "batch_size": 4,
            "micro_batch_size": 2,
            "steps": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 2,
            "validation_every": 3,
            "validation_tokens": 256,
            "device": "cpu",
            "precision": "fp32",  # auto differs between processors
        }
        | training,
        "checkpoint": {"folder": str(folder / "run"), "every": 2, "keep_last": 2},
    }


def tiny_recipe(folder: Path, **training: Any) -> Recipe:
    return build_recipe(tiny_values(folder, **training))


def write_recipe(folder: Path, values: dict[str, Any]) -> Path:
    """The values as a recipe file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path

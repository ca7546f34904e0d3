"""What every readable format becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.config import ModelConfig

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What weights may be stored as, widest first."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. Its names and shapes have been compared with its configuration; no weight was read yet."""

    format: str
    """A name from formats.FORMATS."""
    path: Path
    """The folder or file."""
    config: ModelConfig
    config_json: dict[str, Any]
    """config.json as it is on disk, or as it would be."""
    tensors: Mapping[str, Tensor]
    """Contract names (Hugging Face's for the baseline) -> weights, read when asked for; NaN is refused then."""
    weight_files: tuple[Path, ...]
    """The files that hold the weights."""
    tokenizer_path: Path | None
    """A folder with a tokenizer's files, or a llama2.c tokenizer file; None where there is none."""
    dtype: torch.dtype
    """Of the widest weights."""

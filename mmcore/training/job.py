"""What a trainer is given, and how it ends."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcore.config import Recipe
from mmcore.distributed.mesh import World


@dataclass
class Job:
    """What a trainer works on. `setup.py` makes one from a recipe; tests and scripts may make their own."""

    recipe: Recipe
    model: nn.Module
    samples: Any
    """mmcore.data Samples of the training documents."""
    validation: Sequence = ()
    """Micro-batches of held-out text; empty: no validation."""
    bytes_per_token: float | None = None
    """Of the held-out text."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"
    world: World = field(default_factory=World)
    flops_per_token: float = 0.0
    """Forward and backward, at the recipe's sequence length."""
    config_json: dict[str, Any] = field(default_factory=dict)
    """config.json of the checkpoints."""
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    """Further files of the checkpoints: the tokenizer's, a chat template."""
    data_identity: str = ""
    """Equal exactly where the tokens and their order are."""
    training_tokens: int = 0
    stage: str = "pretrain"
    """pretrain or finetune"""


@dataclass(frozen=True)
class Outcome:
    """How `Trainer.fit` ended."""

    status: str
    """done or interrupted"""
    step: int
    checkpoint: Path | None
    signal: signal.Signals | None = None

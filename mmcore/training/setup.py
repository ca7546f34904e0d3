"""From a recipe to a trainer that is ready to run.

What can be known without work is checked first (checks.py), so that a mistake costs seconds and leaves nothing
half-written; then tokenizer, data, model; the run's folder is written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mmcore.checkpoint.formats import open_checkpoint
from mmcore.checkpoint.resolve import resolve_checkpoint
from mmcore.checkpoint.store import whole_checkpoints
from mmcore.config import Recipe
from mmcore.data.conversations import CHAT_TEMPLATE
from mmcore.data.loader import Loader, Samples
from mmcore.data.prepare import Corpus, prepare
from mmcore.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from mmcore.distributed.mesh import world_from_environment
from mmcore.distributed.parallelize import parallelize
from mmcore.errors import CheckpointError, ConfigError
from mmcore.model import build_model
from mmcore.model.accounting import training_flops_per_token
from mmcore.training import checks
from mmcore.training.events import Event, Listener, Notice, Preparing
from mmcore.training.memory import explain_memory
from mmcore.training.metrics import JsonLines, TensorBoard, keep_lines_until
from mmcore.training.run_folder import RunFolder, check_same_recipe, disk_errors
from mmcore.training.trainer import Job, Trainer, load_weights


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    resume: bool = False
    """Go on from the newest whole checkpoint of the run's folder."""
    overwrite: bool = False
    """Remove what an earlier run left in the folder."""

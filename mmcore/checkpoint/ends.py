"""Where the texts of a checkpoint begin and end: the token ids that its config.json and generation_config.json name.

Many chat models name the token that ends a turn in generation_config.json alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.formats.modelconfig import are_token_ids
from mmcore.checkpoint.untrusted import read_json, shown
from mmcore.errors import CheckpointError

GENERATION = "generation_config.json"


def stop_ids(checkpoint: Checkpoint) -> list[int]:
    """The ids that end a text, config.json's first. Raises CheckpointError where generation_config.json is damaged."""
    named = [*_several(checkpoint.config_json), *_several(_generation_config(checkpoint))]
    return list(dict.fromkeys(named))


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config.json of a folder, {} where there is none."""
    file = checkpoint.path / GENERATION
    values = read_json(file) if checkpoint.path.is_dir() and os.path.lexists(file) else {}
    ends = values.get("eos_token_id")
    if not are_token_ids(ends, several=True):
        raise CheckpointError(f"{file}: eos_token_id is {shown(repr(ends))} and must be a token id: correct or remove it")
    return values


def _several(values: Mapping[str, Any]) -> list[int]:
    ends = values.get("eos_token_id")
    return [] if ends is None else ends if isinstance(ends, list) else [ends]

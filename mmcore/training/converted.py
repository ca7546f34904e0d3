"""Runs that begin with weights from elsewhere: what `mm convert --to train` made of a model without an optimizer.

Such a checkpoint is step 0: no data were seen and no update was made, so any data and any recipe go on from it whose
model computes the same.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mmcore.checkpoint.store import load_state
from mmcore.checkpoint.targets import CONVERTED
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError


def is_converted(state: dict[str, Any]) -> bool:
    """Whether trainer.json is that of weights from elsewhere."""
    return CONVERTED in state


def read_converted(checkpoint: Path, model: ModelConfig) -> bool:
    """Whether a run's checkpoint is weights from elsewhere that `model` can go on from.

    Raises CheckpointError where they are, but a model made by the recipe would compute something else with them.
    """
    saved = load_state(checkpoint)
    if not is_converted(saved.state):
        return False
    differing = [
        f"model.{f.name} is {getattr(model, f.name)!r} in the recipe and {getattr(saved.config, f.name)!r} there"
        for f in dataclasses.fields(ModelConfig)
        if _meaning(model, f.name) != _meaning(saved.config, f.name)
        and getattr(model, f.name) != getattr(saved.config, f.name)  # else it means another thing by what differs elsewhere
    ]
    if differing:
        raise CheckpointError(
            f"the recipe's model is not that of {checkpoint} ({'; '.join(differing)}): change the recipe's model section"
        )
    return True


def _meaning(config: ModelConfig, name: str) -> Any:
    """A setting, alike for those that compute the same."""
    if name in config.unused:
        return None
    known = {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    return known.get(name, getattr(config, name))

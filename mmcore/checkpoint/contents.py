"""What a training checkpoint holds beside its tensors, and which tensors it may hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmcore.checkpoint import disk, tensorfile
from mmcore.checkpoint.formats.modelconfig import generation_config_json
from mmcore.checkpoint.names import expected_tensors
from mmcore.checkpoint.untrusted import shown
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError

STATE = "trainer.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two running averages; stored as `<moment>.<name of the weight>`."""


def own_texts(step: int, state: Mapping[str, Any], config: Mapping[str, Any],
              dtype: torch.dtype) -> dict[str, bytes | Path]:  # fmt: skip
    """The JSON files that every checkpoint has. Raises CheckpointError for a state that JSON cannot hold."""
    values = dict(config) | {"dtype": tensorfile.dtype_name(dtype)}
    try:
        return {
            "config.json": disk.json_bytes(values),
            "generation_config.json": disk.json_bytes(generation_config_json(values)),
            STATE: disk.json_bytes(dict(state) | {"step": step}),
        }
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the trainer's state cannot be written as JSON ({error}): nothing was saved") from error


def check_optimizer(config: ModelConfig, found: Mapping[str, tuple[int, ...]], origin: str,
                    problems: Iterable[str] = ()) -> None:  # fmt: skip
    """Every moment belongs to a weight and has its shape, and no weight has only one of the two."""
    expected = expected_tensors(config)
    faults = list(problems)
    for name, shape in found.items():
        moment, _, weight = name.partition(".")
        if moment not in MOMENTS or weight not in expected:
            faults.append(f"{shown(name)} belongs to no weight")
        elif shape != expected[weight]:
            faults.append(f"{name} is {list(shape)} and must be {list(expected[weight])}")
        elif any(f"{other}.{weight}" not in found for other in MOMENTS):
            faults.append(f"{name} is without its other moment")
    if faults:
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(faults)}")

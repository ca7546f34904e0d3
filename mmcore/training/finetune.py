"""The recipe of a fine-tuning run: the model is the checkpoint's, read at another context or on other data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmcore.checkpoint.formats import open_checkpoint
from mmcore.checkpoint.resolve import iterate_whole
from mmcore.config import ModelConfig, Recipe, build_recipe, read_recipe
from mmcore.config.files import origin
from mmcore.errors import ConfigError

CONTEXT_KEYS = (
    "max_position_embeddings",
    "long_term_delay",
    "long_term_delay_range",
    "rope_theta",
    "rope_scaling",
)
"""What a fine-tuning recipe may change of its checkpoint's model: how far it reads, not what its weights are."""


_SETTINGS = frozenset({"config.json"})
"""What is taken from a checkpoint here, and so must be as it was written. Its weights are verified when they are loaded."""


def load_finetune_recipe(path: str | Path, overrides: Sequence[str] = (), resume: bool = False) -> Recipe:
    """Read a recipe with `training.init_from`; its model section is laid over the checkpoint's configuration.

    resume: take the configuration from the run's own newest checkpoint where it has one, since the first may be gone
    by then. Raises ConfigError where there is no init_from, or where the section changes anything but the context
    (CONTEXT_KEYS), naming every such key; CheckpointError where the checkpoint cannot be read.
    """
    values = read_recipe(path, tuple(overrides))
    given = values.pop("model", None) or {}
    alone = build_recipe(values, origin(path, overrides))  # mistakes elsewhere are found before a checkpoint is opened
    if alone.training.init_from is None:
        raise ConfigError(f"{path} has no training.init_from: name the checkpoint to go on from")
    own = resume and next(iterate_whole(alone.run_folder, lambda _: None, verify=False), None)
    source = open_checkpoint(alone.run_folder if own else alone.training.init_from, verify=_SETTINGS)
    values["model"] = _overlay(source.config, given, source.path)
    return build_recipe(values, origin(path, overrides))


def _overlay(base: ModelConfig, given: dict[str, Any], source: Path) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"the recipe's model is {given!r}: it must be a section with keys")
    kept = {key: _plain(value) for key, value in dataclasses.asdict(base).items()}
    barred = [
        key for key, value in given.items() if key not in CONTEXT_KEYS and key in kept and _plain(value) != kept[key]
    ]
    if barred:
        words = "; ".join(f"model.{key} is {given[key]!r} here and {kept[key]!r} there" for key in barred)
        raise ConfigError(
            f"fine-tuning cannot change the model of {source} ({words}): take those keys out; "
            f"{', '.join(CONTEXT_KEYS)} may change"
        )
    return kept | given


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

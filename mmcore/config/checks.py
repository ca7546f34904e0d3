"""What a recipe needs beyond sections that are right by themselves, before a run begins with it or is planned."""

from __future__ import annotations

import math

from mmcore.config.model import ModelConfig
from mmcore.config.sections import Recipe
from mmcore.errors import ConfigError


def check_run(recipe: Recipe, ranks: int = 1, per_node: int = 1, begins: bool = True) -> None:
    """Raise ConfigError where sections of a recipe contradict one another, or the number of ranks.

    per_node: ranks of one node. begins: not where a run is resumed, whose recipe must stay as it was.
    """
    training = recipe.training
    _check_ranges(recipe, begins)
    training.total_steps  # noqa: B018 - raises where the recipe gives no length
    if not recipe.data.sources:
        raise ConfigError("data.sources is empty: name the files or folders to train on")
    if training.sequence_length > recipe.model.max_position_embeddings:
        raise ConfigError(
            f"training.sequence_length {training.sequence_length} is longer than model.max_position_embeddings "
            f"{recipe.model.max_position_embeddings}: raise the second or lower the first"
        )
    if training.micro_batch_size and training.micro_batch_size > training.batch_size:
        raise ConfigError(
            f"training.micro_batch_size {training.micro_batch_size} is larger than training.batch_size "
            f"{training.batch_size}: lower it"
        )
    micro_batch = training.micro_batch_size or 1
    if ranks > 1 and training.batch_size % (ranks * micro_batch):
        raise ConfigError(
            f"training.batch_size {training.batch_size} does not divide into micro-batches of {micro_batch} on {ranks} "
            f"ranks: make it a multiple of {ranks * micro_batch}, or change training.micro_batch_size or the number of ranks"
        )
    _check_distributed(recipe, ranks, per_node)


def _check_distributed(recipe: Recipe, ranks: int, per_node: int) -> None:
    distributed = recipe.distributed
    share = distributed.shard_size or min(per_node, ranks)
    if distributed.sharding == "hybrid" and ranks > 1 and ranks % share:
        raise ConfigError(
            f"distributed.shard_size {share} does not divide {ranks} ranks: choose a divisor, or sharding=full"
        )
    if distributed.cpu_offload and ranks == 1:
        raise ConfigError(
            "distributed.cpu_offload moves the shares of several ranks to host memory, and this is one process: leave it "
            "out, or start more ranks"
        )


def _without_effect(model: ModelConfig) -> list[str]:
    """Settings that a model of this kind has no use for: who gave them would believe in an effect. Those of memories stay in
    the recipe of a twin that has none."""
    defaults = ModelConfig()
    return [
        f"model.{name} is given for a {model.model_type}, which has no use for it: remove it"
        for name in model.unused
        if model.model_type != "llama" and getattr(model, name) != getattr(defaults, name)
    ]


def _check_ranges(recipe: Recipe, begins: bool) -> None:
    """What no run should begin with. Recipes of earlier runs may hold it, and are still read."""
    training, tokenizer, problems = recipe.training, recipe.tokenizer, _without_effect(recipe.model) if begins else []
    if recipe.data.workers is not None and recipe.data.workers < 0:
        problems.append(f"data.workers is {recipe.data.workers}: it must not be negative")
    if tokenizer.path is None and not 0 < tokenizer.train_megabytes < math.inf:
        problems.append(f"tokenizer.train_megabytes is {tokenizer.train_megabytes}: it must be positive")
    if training.validation_tokens < 1:
        problems.append(f"training.validation_tokens is {training.validation_tokens}: it must be at least 1")
    for name in ("validation_every", "final_learning_rate_ratio"):
        if getattr(training, name) < 0:
            problems.append(f"training.{name} is {getattr(training, name)}: it must not be negative")
    if problems:
        raise ConfigError("; ".join(problems))

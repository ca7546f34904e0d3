"""Running out of memory, told in one sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mmcore.config import Recipe
from mmcore.errors import HardwareError


@contextlib.contextmanager
def explain_memory(recipe: Recipe) -> Iterator[None]:
    """Turn a failed allocation into a HardwareError that says what to reduce; other errors pass."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise HardwareError(out_of_memory(recipe)) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error) and "not enough memory" not in str(error):
            raise
        raise HardwareError(out_of_memory(recipe)) from error


def out_of_memory(recipe: Recipe) -> str:
    """The sentence: what did not fit, and the settings that would make it smaller, the cheapest first."""
    training = recipe.training
    size = training.micro_batch_size or training.batch_size
    remedies = []
    if size > 1:
        remedies.append(f"lower training.micro_batch_size below {size} (same result, in more pieces)")
    if recipe.distributed.activation_checkpointing != "full":
        remedies.append("set distributed.activation_checkpointing=full")
    remedies.append("shorten training.sequence_length or make the model smaller")
    return (
        f"not enough memory for {size} x {training.sequence_length} tokens at once: {', or '.join(remedies)}; "
        f"`mm pretrain RECIPE --plan` shows where the memory goes"
    )

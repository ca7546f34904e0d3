"""What a run takes from a checkpoint, and what it does not accept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mmcore.checkpoint.resolve import steps_in
from mmcore.checkpoint.rows import read_into, shape_of
from mmcore.checkpoint.store import TrainingState, load_state
from mmcore.errors import CheckpointError, DataError


def check_goes_on(saved: TrainingState, checkpoint: Path, data_identity: str, total_steps: int) -> None:
    """Raise DataError where a checkpoint's run saw other data, CheckpointError where its moments were left out and steps
    are still to come, or where it is past the recipe's last step."""
    if saved.state["data_identity"] != data_identity:
        raise DataError(
            f"the data changed since {checkpoint} was written, or an earlier version of mm wrote it and split them "
            f"otherwise, so its position in them means nothing: restore the files or that version, or start a new run "
            f"from it with `mm finetune` and training.init_from"
        )
    if saved.step > total_steps:
        raise CheckpointError(
            f"{checkpoint} is at step {saved.step:,} and the recipe ends at step {total_steps:,}: raise training.steps or "
            f"training.tokens, or remove the checkpoints that are past it"
        )
    updated = saved.state["optimizer_steps"]["*"] > 0  # not where all steps so far were skipped
    if updated and not saved.optimizer and saved.step < total_steps:
        before = f", or remove it to go on from {found.name}" if (found := _full_before(checkpoint, saved.step)) else ""
        raise CheckpointError(
            f"{checkpoint} holds the model alone (checkpoint.final was model), so training cannot go on from it: "
            f"start a new run from it with `mm finetune` and training.init_from{before}"
        )


def _full_before(checkpoint: Path, step: int) -> Path | None:
    """The newest older checkpoint of the run that training can go on from, by its files."""
    for other, path in steps_in(checkpoint.parent):
        try:
            if other < step and load_state(path).optimizer:
                return path
        except CheckpointError:
            continue
    return None


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: Path) -> None:
    """Copy `tensors` into the parameters of `model`, name by name; of a sharded one only this rank's rows are read.

    Raises CheckpointError for any misfit.
    """
    parameters = dict(model.named_parameters())
    missing = [name for name in parameters if name not in tensors]
    extra = [name for name in tensors if name not in parameters]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model has not"
        raise CheckpointError(f"{source} does not fit the recipe's model: it {what}; check the recipe's model section")
    for name, parameter in parameters.items():
        shape = shape_of(tensors, name)
        if shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{source} does not fit the recipe's model: {name} has shape {list(shape)} there and "
                f"{list(parameter.shape)} here; check the recipe's model section"
            )
        read_into(parameter, tensors, name)

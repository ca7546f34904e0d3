"""AdamW, and its state under the names of the parameters.

PyTorch numbers the states of an optimizer; a checkpoint names them after the parameters they belong to, so
that it can be read without this code and survives a change in the order of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmcore.checkpoint.rows import read_into, shape_of
from mmcore.config import TrainingConfig
from mmcore.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the parameters of `model`: weight decay on matrices (two or more dimensions, the embedding
    among them) and none on norms and per-head scalars. The fused form, which updates in one pass over memory,
    wherever the device has it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.adam_eps,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use `value` in the next update of every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = value


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's averages as `<exp_avg or exp_avg_sq>.<parameter name>` -> tensor (not copied)."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for moment in MOMENTS
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def optimizer_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How often each parameter was updated, for the bias correction: plain numbers for a checkpoint.

    `*` stands for most parameters, and any that had no gradient in some step is named beside it.
    """
    steps = {n: int(optimizer.state[p]["step"]) for n, p in model.named_parameters() if p in optimizer.state}
    most = max(steps.values(), default=0)
    return {"*": most} | {name: count for name, count in steps.items() if count != most}


@torch.no_grad()
def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], steps: Mapping[str, int]
) -> None:
    """The inverse of `optimizer_tensors` and `optimizer_steps`; of sharded parameters a rank reads its rows alone.
    Raises CheckpointError for shapes that do not fit."""
    for name, parameter in model.named_parameters():
        if f"{MOMENTS[0]}.{name}" not in tensors:
            optimizer.state.pop(parameter, None)  # one that never had a gradient has none, whatever came after
            continue
        on_device = parameter.device if parameter.device.type == "cuda" else "cpu"
        state = {"step": torch.tensor(float(steps.get(name, steps["*"])), device=on_device)}
        for moment in MOMENTS:
            shape = shape_of(tensors, f"{moment}.{name}")
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"the optimizer state {moment}.{name} has shape {list(shape)} where the model has "
                    f"{list(parameter.shape)}: resume with the recipe that the checkpoint was made with"
                )
            state[moment] = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False)
            read_into(state[moment], tensors, f"{moment}.{name}")
        optimizer.state[parameter] = state

"""AdamW, and its state under the names of the parameters.

PyTorch numbers the states of an optimizer; a checkpoint names them after the parameters they belong to, so
that it can be read without this code and survives a change in the order of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmcore.config import TrainingConfig
from mmcore.errors import CheckpointError

STATES = ("exp_avg", "exp_avg_sq", "step")


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
    """The state of `optimizer` as `<parameter name>.<exp_avg, exp_avg_sq or step>` -> tensor (not copied)."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Raises CheckpointError for names or shapes that do not fit."""
    known = dict(model.named_parameters())
    left = set(tensors)
    for name, parameter in known.items():
        present = [key for key in STATES if f"{name}.{key}" in tensors]
        if not present:
            continue  # a parameter that never had a gradient has no state
        if len(present) < len(STATES):
            missing = ", ".join(f"{name}.{key}" for key in STATES if key not in present)
            raise CheckpointError(f"the optimizer state lacks {missing}: resume from another checkpoint")
        state = {}
        for key in STATES:
            value = tensors[f"{name}.{key}"]
            if key != "step" and value.shape != parameter.shape:
                raise CheckpointError(
                    f"the optimizer state {name}.{key} has shape {list(value.shape)} where the model has "
                    f"{list(parameter.shape)}: resume with the recipe that the checkpoint was made with"
                )
            device = parameter.device if key != "step" or parameter.device.type == "cuda" else "cpu"
            state[key] = value.to(device=device, dtype=torch.float32, copy=True)
            left.discard(f"{name}.{key}")
        optimizer.state[parameter] = state
    if left:
        raise CheckpointError(f"the optimizer state {sorted(left)[0]} belongs to no parameter of this model")

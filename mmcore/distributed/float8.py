"""8-bit matrix products for the blocks' large projections, by torchao (the extra `float8`)."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from mmcore.errors import HardwareError

_TILE = 16
"""The GPU's 8-bit products want both sizes of a matrix to be multiples of this."""


def check_float8(device: torch.device) -> None:
    """Raise HardwareError where `device` has no 8-bit products or torchao is not installed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the device {device.type}"
        raise HardwareError(
            f"training.precision is fp8, which {what} cannot compute: set training.precision=bf16, or use an H100 or newer"
        )
    if importlib.util.find_spec("torchao") is None:
        raise HardwareError(
            "training.precision is fp8, which needs torchao: install it with `pip install 'mm[float8]'`, or set "
            "training.precision=bf16"
        )


def use_float8(model: nn.Module) -> nn.Module:
    """Replace the blocks' projections by ones that multiply in float8, and return the model.

    Activations, weights and gradients are scaled by the largest value of each tensor, found anew at every product.
    Weights, and with them checkpoints, stay what they are. The gates (a row for each head: too thin to gain) and the
    classifier (whose loss is one kernel) are left in bf16, and over several ranks weights travel in bf16. To be called
    before `parallelize`.
    """
    from torchao.float8 import convert_to_float8_training

    return convert_to_float8_training(model, module_filter_fn=takes_float8)


def takes_float8(module: nn.Module, name: str) -> bool:
    """Whether the projection `name` is one of a block's large ones."""
    if not isinstance(module, nn.Linear) or ".layers." not in f".{name}":
        return False
    return module.in_features % _TILE == 0 and module.out_features % _TILE == 0 and min(module.weight.shape) >= 256

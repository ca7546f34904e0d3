"""The gate of the persistent memory in plain PyTorch: the definition of right."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `mmcore.kernels.swiglu.swiglu`; differentiable by autograd, in fp32 or (for fp64 inputs) fp64."""
    precision = torch.float64 if gate.dtype == torch.float64 else torch.float32
    gate_, up_ = gate.to(precision), up.to(precision)
    return (gate_ * torch.sigmoid(gate_) * up_).to(gate.dtype)

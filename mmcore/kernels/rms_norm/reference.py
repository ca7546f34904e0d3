"""RMSNorm in plain PyTorch: the definition of right."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mmcore.kernels.rms_norm.rms_norm`; differentiable by autograd, in fp32 or (for fp64 inputs) fp64."""
    precise = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    rstd = torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + eps)
    return (precise * rstd).to(x.dtype) * weight

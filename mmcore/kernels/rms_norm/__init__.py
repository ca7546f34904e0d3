"""RMSNorm with a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels import dispatch
from mmcore.kernels.rms_norm import blocked, cpu, reference


def _triton(*arguments):
    """Imported with its first use: Triton takes half a second."""
    from mmcore.kernels.rms_norm import triton

    return triton.rms_norm(*arguments)


_TABLE = {"cpu": cpu.rms_norm, "triton": _triton, "blocked": blocked.rms_norm, "reference": reference.rms_norm}
_DOUBLE = {name: _TABLE[name] for name in ("blocked", "reference")}


def rms_norm(x: Tensor, weight: Tensor, eps: float, implementation: str = "auto") -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension.

    x [..., d], fp16, bf16, fp32 or fp64, any strides; weight [d]; eps > 0 is added to the mean square.
    The mean and the quotient are computed in fp32 (fp64 for fp64 inputs); the quotient is cast to x's dtype and then
    multiplied by the weight, so y [..., d] has the dtype that x * weight has. Gradients flow to x and weight; on the
    CPU the weight's is summed in an order that depends on the number of threads only.
    Raises ValueError for shapes that do not fit, and dispatch's errors for an implementation that cannot run.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm got x {tuple(x.shape)} and weight {tuple(weight.shape)}: give [..., d] and [d]")
    # The compiled forms compute in fp32: fp64, which asks for more, goes to a PyTorch form by itself.
    double = x.dtype == torch.float64 and implementation == "auto"
    run = dispatch.choose("rms_norm", _DOUBLE if double else _TABLE, implementation, x.device, True)
    return run(x, weight, eps)

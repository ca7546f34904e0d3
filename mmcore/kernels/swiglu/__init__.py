"""The gated activation of the persistent memory (SwiGLU: Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels import dispatch
from mmcore.kernels.swiglu import blocked, cpu, reference


def _triton(*arguments):
    """Imported with its first use: Triton takes half a second."""
    from mmcore.kernels.swiglu import triton

    return triton.swiglu(*arguments)


_TABLE = {"cpu": cpu.swiglu, "triton": _triton, "blocked": blocked.swiglu, "reference": reference.swiglu}
_DOUBLE = {name: _TABLE[name] for name in ("blocked", "reference")}


def swiglu(gate: Tensor, up: Tensor, implementation: str = "auto") -> Tensor:
    """silu(gate) * up, with silu(g) = g / (1 + exp(-g)).

    gate, up [..., d'], both of one shape and dtype (fp16, bf16, fp32 or fp64), any strides: the two halves of a fused
    projection are read in place. Returns [..., d'] in that dtype, computed in fp32 (fp64 for fp64 inputs). Only gate
    and up are kept for the backward pass, which computes the sigmoid again. Gradients flow to both.
    Raises ValueError for shapes or dtypes that differ, and dispatch's errors for an implementation that cannot run.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu got gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}: "
            f"give one shape and dtype"
        )
    # The compiled forms compute in fp32: fp64, which asks for more, goes to a PyTorch form by itself.
    double = gate.dtype == torch.float64 and implementation == "auto"
    run = dispatch.choose("swiglu", _DOUBLE if double else _TABLE, implementation, gate.device, True)
    return run(gate, up)

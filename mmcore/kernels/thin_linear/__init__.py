"""The product of a few rows with a weight matrix, for decoding: as fast as the weights can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.errors import HardwareError
from mmcore.kernels import dispatch, registry
from mmcore.kernels.thin_linear import cpu, reference
from mmcore.kernels.thin_linear.cpu import MOST_ROWS

__all__ = ["MOST_ROWS", "thin_linear"]

_TABLE = {"cpu": cpu.thin_linear, "blocked": reference.library_linear, "reference": reference.thin_linear}


def thin_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, *, implementation: str = "auto") -> Tensor:
    """x @ weight.T, for inference: the result has no gradient.

    x [..., in] is fp32; the weight [out, in] fp32, bf16, or int8 with `scale` fp32 [out], which multiplies its rows.
    Returns a contiguous fp32 tensor [..., out]. Up to 16 rows of x on a CPU take a compiled kernel, which may round x,
    never weights or sums, to meet narrow weights: to bf16 for bf16 ones where the processor has AVX512-BF16 (or AMX); for
    int8 ones where it has AVX2 to whole numbers of 16 bits, max |x| / 32767 of its row each. More rows, other dtypes and
    other devices take the library's matrix product (in x's dtype).

    Raises ValueError where a gradient is asked for or shapes do not fit, HardwareError where implementation="cpu" is
    given something that it cannot compute.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise ValueError("thin_linear has no gradient: call it under torch.no_grad(), or use F.linear")
    out, inside = weight.shape
    if inside != x.shape[-1] or (scale is not None and scale.shape != (out,)):
        scales = "" if scale is None else f" with scales {list(scale.shape)}"
        raise ValueError(f"thin_linear: x is {list(x.shape)} and the weight {[out, inside]}{scales}: give [out, in], [out]")
    function = dispatch.choose("thin_linear", _TABLE, implementation, x.device)
    if function is cpu.thin_linear:
        if registry.watched():
            registry.refuse_tangents("thin_linear_cpu", (x, weight))
            return cpu.traced(x, weight, scale)
        if reason := cpu.why_not(x, weight, scale):
            if implementation == "cpu":
                raise HardwareError(f"thin_linear cannot run as 'cpu': {reason}")
            function = reference.library_linear
    return function(x, weight, scale)

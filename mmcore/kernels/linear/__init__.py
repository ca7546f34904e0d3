"""Projections of many rows, several of one input in a call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmcore.errors import HardwareError
from mmcore.kernels import dispatch
from mmcore.kernels.linear import cpu, reference

_TABLE = {"cpu": cpu.linear, "blocked": reference.library_linear, "reference": reference.linear}


def linear(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None = None, *,
    rounded: Sequence[Tensor] | None = None, narrow: bool = False, implementation: str = "auto",
) -> list[Tensor]:  # fmt: skip
    """y_i = x W_i^T for every W_i: x [..., in], weights [out_i, in]; returns [..., out_i] in the order of the weights.

    fp32 x on a CPU takes compiled products, which read x once for all matrices and sum its gradient over them. Weights
    may there be bf16, or int8 with `scales` fp32 [out_i] of their rows, for inference: x is then rounded to meet them, as
    in `thin_linear`. Under autocast in bf16 they take a processor's bf16 products where it has them: all operands are
    rounded, here and for the gradients, and sums and results are fp32; x may be bf16 then, and `narrow` asks for such
    results, whose gradients, and those of a bf16 x, are bf16 too. Else under autocast, for other dtypes and on other
    devices each product is the library's, in x's dtype where the weights' is another. Gradients flow to x and to weights
    in fp32. `rounded`: the weights in autocast's dtype, for the library's products on a GPU, which round them anew
    without it; gradients flow past it.

    Raises ValueError for shapes that do not fit, HardwareError where implementation="cpu" is given what it cannot compute.
    """
    inside = x.shape[-1]
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != inside:
            raise ValueError(f"linear: x is {list(x.shape)} and a weight {list(weight.shape)}: give [out, {inside}]")
    function = dispatch.choose("linear", _TABLE, implementation, x.device)
    if function is cpu.linear and (reason := cpu.why_not(x, weights, scales)):
        if implementation == "cpu":
            raise HardwareError(f"linear cannot run as 'cpu': {reason}")
        function = reference.library_linear
    if function is reference.library_linear:
        return function(x, weights, scales, rounded)
    if function is cpu.linear:
        return function(x, weights, scales, narrow)
    return function(x, weights, scales)

"""Products of a few rows with weight matrices, for decoding: as fast as the weights can be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcore.errors import HardwareError
from mmcore.kernels import dispatch
from mmcore.kernels.thin_linear import cpu, reference
from mmcore.kernels.thin_linear.cpu import MOST_ROWS

_TABLE = {"cpu": cpu.thin_linears, "blocked": reference.library_linears, "reference": reference.thin_linears}


def thin_linear(x: Tensor, weight: Tensor, *, implementation: str = "auto") -> Tensor:
    """x @ weight.T. One matrix; see `thin_linears`."""
    return thin_linears(x, (weight,), implementation=implementation)[0]


def thin_linears(x: Tensor, weights: Sequence[Tensor], *, implementation: str = "auto") -> list[Tensor]:
    """[x @ weight.T for weight in weights], for inference: the result has no gradient.

    x [..., in] is fp32; the weights [out_m, in] are all of one dtype; bf16 weights are widened to fp32 one by one,
    never rounded further. Returns contiguous fp32 tensors [..., out_m]. With up to 16 rows of x and fp32 or bf16 weights
    on a CPU, all the matrices are read in one pass by all threads: the projections of one layer cost one call, not
    six. More rows, other dtypes and other devices take the library's matrix product (in x's dtype).

    Raises ValueError where a gradient is asked for or shapes do not fit, HardwareError where implementation="cpu" is
    given something that it cannot compute.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        raise ValueError("thin_linear has no gradient: call it under torch.no_grad(), or use F.linear")
    function = dispatch.choose("thin_linear", _TABLE, implementation, x.device)
    if function is not cpu.thin_linears:
        return function(x, weights)
    if torch.compiler.is_compiling():
        return [cpu.traced(x, weight) for weight in weights]
    call = cpu.prepare(x, weights, MOST_ROWS)
    if not isinstance(call, str):
        return cpu.thin_linears(x, call)
    if implementation == "cpu":
        raise HardwareError(f"thin_linear cannot run as 'cpu': {call}")
    return reference.library_linears(x, weights)

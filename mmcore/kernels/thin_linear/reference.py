"""The definition of thin_linear, and the library's product for what the compiled kernel does not take."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def thin_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """y[..., o] = sum_i x[..., i] weight[o, i] scale[o], in x's dtype."""
    return (x[..., None, :] * _widened(weight, scale, x)).sum(-1)


def library_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """The same through F.linear; weights of another dtype are converted to x's for the length of the call."""
    return F.linear(x, _widened(weight, scale, x))


def _widened(weight: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    return weight.to(x.dtype) if scale is None else weight.to(x.dtype) * scale[:, None].to(x.dtype)

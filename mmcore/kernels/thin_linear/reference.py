"""The definition of thin_linear, and the library's product for what the compiled kernel does not take."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def thin_linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """y[..., o] = sum_i x[..., i] weight[o, i], in x's dtype."""
    return [(x[..., None, :] * weight.to(x.dtype)).sum(-1) for weight in weights]


def library_linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The same through F.linear; weights of another dtype are converted to x's for the length of the call."""
    return [F.linear(x, weight.to(x.dtype)) for weight in weights]

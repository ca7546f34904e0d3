"""What the C kernels ask of a tensor's place in memory, and how many threads a call is worth."""

from __future__ import annotations

import torch
from torch import Tensor

# Fewer numbers than this (some 16 us of work) are not worth waking a second thread for.
PARALLEL = 65_536

FLOATS = {"dtype": torch.float32, "device": "cpu"}
"""What a C function reads and writes. It is said of each tensor that is made for one: the default dtype and device are the
user's, who may have set others."""


def threads_for(count: int) -> int:
    """Threads for a pass over `count` numbers."""
    return torch.get_num_threads() if count >= PARALLEL else 1


def with_heads_together(x: Tensor) -> Tensor:
    """x [B, T, H, D] itself where heads and their numbers lie side by side, else a copy where they do."""
    _, _, heads, size = x.stride()
    return x if size == 1 and heads == x.shape[3] else x.contiguous()


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x [..., d] and the distance in memory from row to row; a copy where rows are not evenly spaced runs."""
    if not x.is_contiguous():
        shape, strides = x.shape, x.stride()
        if strides[-1] != 1 or any(strides[i] != strides[i + 1] * shape[i + 1] for i in range(x.dim() - 2)):
            x = x.contiguous()
        elif x.dim() > 1:
            return x, strides[-2]
    return x, x.shape[-1]

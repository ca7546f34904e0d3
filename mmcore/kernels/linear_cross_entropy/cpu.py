"""The chunked loss with its row operation in C: one pass over a row for the exponentials, one to scale them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from mmcore.kernels import native
from mmcore.kernels.linear_cross_entropy import blocked


@functools.cache
def _softmax_rows() -> ctypes._CFuncPtr:
    function = native.load(Path(__file__).with_name("cpu.c")).mm_softmax_rows
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_int] * 2
    function.restype = None
    return function


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """As in `mmcore.kernels.linear_cross_entropy`. fp32; half precision is computed in fp32, where this processor's
    matrix products are 8 to 130 times faster; fp64 takes the PyTorch row operation."""
    if hidden.dtype == torch.float64:
        return blocked.linear_cross_entropy(hidden, weight, labels, reduction)
    return blocked.apply(hidden.float(), weight.float(), labels, reduction, _step)


def _step(logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
    losses = torch.empty(len(logits))
    labels = labels.contiguous()
    _softmax_rows()(
        logits.data_ptr(), labels.data_ptr(), losses.data_ptr(), *logits.shape, logits.stride(0),
        int(with_gradient), torch.get_num_threads(),
    )
    return losses

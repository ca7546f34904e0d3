"""The chunked loss with its row operation in C: one pass over a row for the exponentials, one to scale them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from mmcore.kernels import native
from mmcore.kernels.layout import FLOATS
from mmcore.kernels.linear.cpu import multiplies_bf16
from mmcore.kernels.linear_cross_entropy import blocked

_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    mm_softmax_rows=[ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3 + [ctypes.c_int] * 2,
)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """As in `mmcore.kernels.linear_cross_entropy`. fp32; half precision is computed in fp32, but for products of bf16 where
    the processor has them; fp64 takes the PyTorch row operation."""
    if hidden.dtype == torch.float64:
        return blocked.linear_cross_entropy(hidden, weight, labels, reduction)
    if hidden.dtype is weight.dtype is torch.bfloat16 and multiplies_bf16():
        return rounded(hidden, weight, labels, reduction)
    return blocked.apply(hidden.float(), weight.float(), labels, reduction, "cpu")


def rounded(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """The same with products of operands rounded to bf16. Logits and the sums of gradients are fp32."""
    return blocked.apply(hidden.float(), weight.float(), labels, reduction, "rounded")


def _step(logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
    losses = torch.empty(len(logits), **FLOATS)
    labels = labels.contiguous()
    _C.mm_softmax_rows(
        logits.data_ptr(), labels.data_ptr(), losses.data_ptr(), *logits.shape, logits.stride(0),
        int(with_gradient), torch.get_num_threads(),
    )
    return losses


blocked.STEPS.update(cpu=_step, rounded=_step)

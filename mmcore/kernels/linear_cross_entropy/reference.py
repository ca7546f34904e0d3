"""The definition of linear_cross_entropy: logits, log-softmax, the label's entry. Holds N x V."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.kernels.linear_cross_entropy.blocked import IGNORED


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """As in `mmcore.kernels.linear_cross_entropy`, differentiable by plain autograd."""
    return of_logits(hidden @ weight.to(hidden.dtype).T, labels, reduction)


def of_logits(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """The same from logits [N, V]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    kept = labels != IGNORED
    log_p = torch.log_softmax(logits, dim=1)
    losses = -log_p.gather(1, torch.where(kept, labels, 0)[:, None]).squeeze(1)
    losses = torch.where(kept, losses, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / kept.sum().clamp(min=1)

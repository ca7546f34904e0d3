"""Where each document of a packed batch begins.

Shape suffixes in mmcore.model: B batch, T time, H heads, D head size, d = H * D hidden, F intermediate, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """What the memories must know of documents. None stands for "one document a row, from its first token"."""

    starts: Tensor | None = None
    """int32 [B, T]: index in the row of the first token of the token's document."""
    resets: Tensor | None = None
    """bool [B, T]: whether the token is the first of its document."""


def packing(documents_BT: Tensor | None) -> Packing:
    """The packing of a batch from document ids, int [B, T]; neighbours with equal ids are one document."""
    if documents_BT is None:
        return Packing()
    _, T = documents_BT.shape
    resets = torch.ones_like(documents_BT, dtype=torch.bool)
    resets[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    index = torch.arange(T, device=documents_BT.device, dtype=torch.int32)
    starts = torch.where(resets, index, 0).cummax(dim=1).values
    return Packing(starts.to(torch.int32), resets)

"""The loss on held-out text: the same windows every time, read as at inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from mmcore.training.step import IGNORED, autocast


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Sequence,
    device: torch.device,
    precision: str,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[float, int] | None:
    """Mean cross-entropy in nats over the labels of `batches`, and their number; None where `stop` said so midway.

    The long-term delay is the configuration's, as in inference. Sums of micro-batches are added in float64.
    """
    was_training = model.training
    model.eval()
    nats, labels_seen, tokens_seen = 0.0, 0, 0
    try:
        for batch in batches:
            if stop():
                return None
            tokens, labels, documents = (part.to(device) for part in (batch.tokens, batch.labels, batch.documents))
            with autocast(device, precision):
                nats += float(model.loss(tokens, labels, documents, reduction="sum"))
            labels_seen += int((batch.labels != IGNORED).sum())
            tokens_seen += batch.tokens.numel()
            progress(tokens_seen)
    finally:
        model.train(was_training)
    return nats / max(1, labels_seen), labels_seen


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Nats per token as bits per byte of the text behind the tokens."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None

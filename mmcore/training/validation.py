"""The loss on held-out text: the same windows every time, read as at inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from mmcore.distributed.mesh import World
from mmcore.distributed.parallelize import reshard
from mmcore.distributed.reduce import total
from mmcore.training.step import IGNORED, autocast


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Sequence,
    device: torch.device,
    precision: str,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda tokens: None,
    world: World | None = None,
) -> tuple[float, int] | None:
    """Mean cross-entropy in nats over the labels of `batches`, and their number; None where `stop` said so midway.

    Every rank is given all batches and reads every world.size-th of them; all get the same result. The long-term delay
    is the configuration's, as in inference. Sums of micro-batches are added in float64.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    tokens_seen = 0
    try:
        for first in range(0, len(batches), world.size):
            if stop():
                return None
            row = batches[first : first + world.size]
            # Weights are gathered by all ranks together: one whose turn has no batch left reads along and counts nothing
            mine = row[world.rank] if world.rank < len(row) else row[0]
            tokens, labels, documents = (part.to(device) for part in (mine.tokens, mine.labels, mine.documents))
            with autocast(device, precision):
                nats = float(model.loss(tokens, labels, documents, reduction="sum"))
            if world.rank < len(row):
                sums += torch.tensor([nats, int((mine.labels != IGNORED).sum())], dtype=torch.float64)
            tokens_seen += sum(batch.tokens.numel() for batch in row)
            progress(tokens_seen)
    finally:
        reshard(model)
        model.train(was_training)
    nats, labels_seen = total(sums, world).tolist()
    return nats / max(1, labels_seen), int(labels_seen)


def bits_per_byte(loss: float, bytes_per_token: float | None) -> float | None:
    """Nats per token as bits per byte of the text behind the tokens."""
    return loss / math.log(2) / bytes_per_token if bytes_per_token else None

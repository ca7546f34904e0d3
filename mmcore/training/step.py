"""One optimizer step: gradients over micro-batches, and whether they are finite."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcore.config import DistributedConfig
from mmcore.distributed.mesh import World
from mmcore.distributed.parallelize import micro_batch
from mmcore.distributed.reduce import total, total_over_shards
from mmcore.distributed.shards import local

IGNORED = -100
"""The label of a token that is not trained."""


@dataclass(frozen=True)
class StepResult:
    """What one step's forward and backward passes gave."""

    loss: float
    """Mean over the trained labels of all ranks, nats."""
    gradient_norm: float
    """Global 2-norm before clipping."""
    trained_tokens: int
    micro_losses: tuple[float, ...]
    """Each micro-batch's share of `loss`, this rank's."""
    micro_sizes: tuple[int, ...] = ()
    """Sequences in each micro-batch, of which the last may have fewer; empty: equally many."""

    @property
    def is_finite(self) -> bool:
        """Whether an update may be made. The same on every rank."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """bf16 products over fp32 master weights (in fp8, of whatever is not an 8-bit product), or plain fp32."""
    if precision in ("bf16", "fp8"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def accumulate(
    model: nn.Module,
    batches: Sequence,
    delay: int,
    device: torch.device,
    precision: str,
    world: World,
    distributed: DistributedConfig | None = None,
) -> StepResult:
    """Add the gradient of the mean loss over all `batches` (and ranks) to the parameters' `.grad`.

    `batches` are this rank's micro-batches with tokens, labels and documents int64 or int32 [b, T]. Each one's loss is
    the sum over its labels divided by the number of labels of the whole step on all ranks, and gradients are summed over
    micro-batches and ranks, so that the gradient is the one of a single pass over everything, however the step is cut
    and wherever the labels lie. Nothing is clipped here.
    """
    kept = int(total(torch.tensor(sum(int((batch.labels != IGNORED).sum()) for batch in batches)), world))
    distributed = distributed or DistributedConfig()
    losses = []
    for number, batch in enumerate(batches, start=1):
        tokens, labels, documents = (
            part.to(device, non_blocking=True) for part in (batch.tokens, batch.labels, batch.documents)
        )
        micro_batch(model, distributed, last=number == len(batches))
        with autocast(device, precision):
            loss = model.loss(tokens, labels, documents, delay=delay, reduction="sum") / max(1, kept)
        loss.backward()
        losses.append(loss.detach().float())
    norm = gradient_norm(model, world)
    micro = torch.stack(losses)
    mean = total(micro.sum(), world)
    *micro_losses, loss_value, norm_value = torch.cat([micro, mean[None], norm[None].to(micro)]).tolist()
    return StepResult(loss_value, norm_value, kept, tuple(micro_losses), tuple(len(batch.tokens) for batch in batches))


@torch.no_grad()
def gradient_norm(model: nn.Module, world: World) -> Tensor:
    """The 2-norm of the whole gradient, a scalar tensor; over several ranks each adds what its shards hold."""
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    if world.size == 1:
        return norm
    square = norm.double().square().to(world.mesh.device_type)  # offloaded gradients lie in host memory
    return total_over_shards(square, world).sqrt()


@torch.no_grad()
def clip(model: nn.Module, norm: float, largest: float) -> None:
    """Scale the gradients so that their global norm, now `norm`, is at most `largest`."""
    if norm > largest:
        gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, largest / norm)


def what_is_not_finite(result: StepResult, model: nn.Module, own: range, whole: range) -> str | None:
    """What is not finite on this rank, in words that name the samples; None where its losses and gradients are.

    own: this rank's global sample numbers of the step, in the order of the micro-batches; whole: those of all ranks,
    whose gradients are already summed.
    """
    even = max(1, math.ceil(len(own) / max(1, len(result.micro_losses))))
    ends = list(itertools.accumulate(result.micro_sizes or (even,) * len(result.micro_losses)))
    bad = [i for i, loss in enumerate(result.micro_losses) if not math.isfinite(loss)]
    if bad:
        where = ", ".join(_span(own[ends[i - 1] if i else 0 : ends[i]]) for i in bad[:4])
        return f"the loss is {result.micro_losses[bad[0]]} on samples {where}"
    if math.isfinite(result.gradient_norm):
        return None
    worst = _worst_gradient(model)
    return worst and f"the gradient norm is {result.gradient_norm} ({worst}) on samples {_span(whole)}"


def _span(samples: range) -> str:
    return f"{samples[0]}-{samples[-1]}" if len(samples) > 1 else f"{samples[0]}"


def _worst_gradient(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all()):
            return f"first in {name}"
    return None

"""Cross entropy in chunks of rows, with one buffer of logits that every chunk reuses. Any device, any dtype.

"mean" and "sum" end the graph, so the upstream gradient is one number and the gradients can be made while a
chunk's logits are still in the cache (the idea is Liger-Kernel's). They are kept unscaled, the weight's in fp32,
and multiplied in the backward pass: half precision does not lose small ones to the division by N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

IGNORED = -100

# (logits [C, V], labels [C], with_gradient) -> losses [C]; with_gradient turns logits into softmax - onehot in place.
Step = Callable[[Tensor, Tensor, bool], Tensor]


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """As in `mmcore.kernels.linear_cross_entropy`."""
    return apply(hidden, weight, labels, reduction, softmax_step)


def apply(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, step: Step) -> Tensor:
    """The chunked loss with `step` as its row operation."""
    if reduction == "none":
        return _RowLosses.apply(hidden, weight, labels, step)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total = _TotalLoss.apply(hidden, weight, labels, step, wanted)
    return total if reduction == "sum" else total / (labels != IGNORED).sum().clamp(min=1)


def softmax_step(logits: Tensor, labels: Tensor, with_gradient: bool) -> Tensor:
    """One chunk in PyTorch operations, in place: losses, and logits -> softmax - onehot (0 in ignored rows)."""
    kept = labels != IGNORED
    targets = torch.where(kept, labels, 0)[:, None]
    logits.sub_(logits.amax(dim=1, keepdim=True))
    target_logits = logits.gather(1, targets)
    total = logits.exp_().sum(dim=1, keepdim=True)
    losses = torch.where(kept, (total.log() - target_logits).squeeze(1), 0.0)
    if with_gradient:
        logits.mul_(torch.where(kept[:, None], total.reciprocal(), 0.0))
        logits.scatter_add_(1, targets, -kept[:, None].to(logits.dtype))
    return losses


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of logits held at once.

    CPU, d 512, V 8192, 4,096 rows, loss with gradients: 797 ms with 128 rows, 752 with 256, 669 with 512, 646 with
    1,024 (F.linear and F.cross_entropy 1,152). 512 rows there are 16 MiB, which still fit the third-level cache. A GPU
    needs thousands of rows to fill its cores, and 1 GiB of logits is small beside what else a step holds there.
    """
    return max(128, min(1024, 2**22 // vocabulary)) if device.type == "cpu" else max(256, 2**28 // vocabulary)


class _Chunks:
    """The products of the chunks of one call, with the buffer they share."""

    def __init__(self, hidden: Tensor, weight: Tensor, step: Step) -> None:
        self.hidden, self.weight, self.step = hidden, weight, step
        self.rows = min(chunk_rows(len(weight), hidden.device), max(1, len(hidden)))
        self.statistics = torch.promote_types(hidden.dtype, torch.float32)
        self.buffer = hidden.new_empty(self.rows, len(weight))
        self.grad_weight: Tensor | None = None

    def spans(self) -> list[tuple[int, int]]:
        count = len(self.hidden)
        return [(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]

    def losses(self, labels: Tensor, start: int, stop: int, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """Losses of the rows, and their logits turned into softmax - onehot (or scratch without the gradient)."""
        logits = torch.mm(self.hidden[start:stop], self.weight.T, out=self.buffer[: stop - start])
        logits = logits.to(self.statistics)  # the buffer itself, unless the inputs are half precision
        return self.step(logits, labels[start:stop], with_gradient), logits

    def add_to_weight(self, grad_logits: Tensor, start: int, stop: int) -> None:
        """grad_weight += grad_logits^T hidden, summed in the dtype of the statistics."""
        hidden = self.hidden[start:stop]
        if grad_logits.dtype == self.statistics:
            if self.grad_weight is None:
                self.grad_weight = torch.mm(grad_logits.T, hidden)
            else:
                self.grad_weight.addmm_(grad_logits.T, hidden)
        else:
            product = torch.mm(grad_logits.T, hidden).to(self.statistics)
            self.grad_weight = product if self.grad_weight is None else self.grad_weight.add_(product)


class _TotalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, step, wanted):
        chunks = _Chunks(hidden, weight, step)
        total = torch.zeros((), dtype=chunks.statistics, device=hidden.device)
        for_hidden, for_weight = (wanted and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        for start, stop in chunks.spans():
            losses, grad_logits = chunks.losses(labels, start, stop, wanted)
            total += losses.sum()
            grad_logits = grad_logits.to(hidden.dtype)
            if for_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[start:stop])
            if for_weight:
                chunks.add_to_weight(grad_logits, start, stop)
        if for_weight and chunks.grad_weight is None:  # no rows at all
            chunks.grad_weight = torch.zeros_like(weight)
        ctx.save_for_backward(grad_hidden, chunks.grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        grad_hidden, grad_weight = ctx.saved_tensors
        # Not in place: a second backward pass through a retained graph must find them as they were.
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.to(upstream.dtype) * upstream).to(ctx.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.dtype)
        return grad_hidden, grad_weight, None, None, None


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, step):
        chunks = _Chunks(hidden, weight, step)
        losses = torch.empty(len(hidden), dtype=chunks.statistics, device=hidden.device)
        for start, stop in chunks.spans():
            losses[start:stop] = chunks.losses(labels, start, stop, False)[0]
        ctx.save_for_backward(hidden, weight, labels)
        ctx.step = step
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        hidden, weight, labels = ctx.saved_tensors
        chunks = _Chunks(hidden, weight, ctx.step)
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        for start, stop in chunks.spans():
            _, grad_logits = chunks.losses(labels, start, stop, True)
            grad_logits = grad_logits.mul_(upstream[start:stop, None]).to(hidden.dtype)
            if for_hidden:
                torch.mm(grad_logits, weight, out=grad_hidden[start:stop])
            if for_weight:
                chunks.add_to_weight(grad_logits, start, stop)
        if for_weight and chunks.grad_weight is None:
            chunks.grad_weight = torch.zeros_like(weight)
        grad_weight = chunks.grad_weight
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None

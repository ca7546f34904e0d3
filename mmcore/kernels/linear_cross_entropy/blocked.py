"""Cross entropy in chunks of rows, with one buffer of logits that every chunk reuses. Any device, any dtype.

"mean" and "sum" end the graph, so the upstream gradient is one number and the gradients can be made while a
chunk's logits are still in the cache (the idea is Liger-Kernel's). They are kept unscaled, the weight's in fp32,
and multiplied in the backward pass: half precision does not lose small ones to the division by N.

The weight may be of another dtype than hidden: products are in hidden's, and a gradient in fp32 stays that for a weight
in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmcore.kernels import registry
from mmcore.kernels.layout import FLOATS
from mmcore.kernels.linear import cpu as products
from mmcore.kernels.loss_chunks import chunk_rows

IGNORED = -100

# (logits [C, V], labels [C], with_gradient) -> losses [C]; with_gradient turns logits into softmax - onehot in place.
Step = Callable[[Tensor, Tensor, bool], Tensor]

STEPS: dict[str, Step] = {}
"""The row operations by name: an operator's arguments are tensors, numbers and text."""

TAKE_HALF: set[str] = set()
"""Those that read 16-bit logits as they are and compute in fp32; the others are given fp32."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """As in `mmcore.kernels.linear_cross_entropy`."""
    return apply(hidden, weight, labels, reduction, "blocked")


def apply(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, step: str) -> Tensor:
    """The chunked loss with STEPS[step] as its row operation."""
    if reduction == "none":
        return _rows(hidden, weight, labels, step)
    recorded = torch.is_grad_enabled()
    total, _, _ = _total(hidden, weight, labels, step, recorded and hidden.requires_grad, recorded and weight.requires_grad)
    # A copy: the operator's own output is saved for its backward pass, and a caller may scale what he is given in place.
    return total.clone() if reduction == "sum" else total / (labels != IGNORED).sum().clamp(min=1)


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


STEPS["blocked"] = softmax_step


def check_labels(labels: Tensor, words: int) -> None:
    """Raises ValueError for a label that is no word. The operators ask it when they run: a traced call cannot, and C reads
    and writes where a label says. Not of a GPU, which would have to be waited for: there PyTorch's row operation stops, and
    Triton's gives NaN."""
    if labels.device.type != "cpu" or not labels.numel():
        return
    low, high = torch.aminmax(torch.where(labels == IGNORED, 0, labels))
    if low < 0 or high >= words:
        bad = int(low if low < 0 else high)
        raise ValueError(f"linear_cross_entropy: label {bad} lies outside the vocabulary of {words}")


class _Chunks:
    """The products of the chunks of one call, with the buffer they share."""

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, step: str) -> None:
        check_labels(labels, len(weight))
        self.hidden, self.weight, self.labels, self.step = hidden, weight.to(hidden.dtype), labels, STEPS[step]
        self.widen = step not in TAKE_HALF
        # the C products go with the C softmax
        self.rounded = step == "rounded"
        self.compiled = step in ("cpu", "rounded") and products.why_not(hidden, [self.weight], None) is None
        self.rows = min(chunk_rows(len(weight), hidden.device.type), max(1, len(hidden)))
        self.statistics = torch.promote_types(hidden.dtype, torch.float32)
        self.buffer = hidden.new_empty(self.rows, len(weight))
        self.grad_weight: Tensor | None = None

    def spans(self) -> list[tuple[int, int]]:
        count = len(self.hidden)
        return [(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]

    def losses(self, start: int, stop: int, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """Losses of the rows, and their logits turned into softmax - onehot (or scratch without the gradient)."""
        logits = self.buffer[: stop - start]
        if self.compiled:
            products.products(self.hidden[start:stop], [self.weight], out=logits, rounded=self.rounded)
        else:
            torch.mm(self.hidden[start:stop], self.weight.T, out=logits)
        if self.widen:
            logits = logits.to(self.statistics)  # the buffer itself, unless the inputs are half precision
        return self.step(logits, self.labels[start:stop], with_gradient), logits

    def add_to_weight(self, grad_logits: Tensor, start: int, stop: int) -> None:
        """grad_weight += grad_logits^T hidden, summed in the dtype of the statistics."""
        hidden = self.hidden[start:stop]
        if self.compiled:
            begins = self.grad_weight is None
            self.grad_weight = torch.empty(self.weight.shape, **FLOATS) if begins else self.grad_weight
            products.weight_gradients([grad_logits], hidden, [self.grad_weight], not begins, self.rounded)
        elif grad_logits.dtype == self.statistics:
            if self.grad_weight is None:
                self.grad_weight = torch.mm(grad_logits.T, hidden)
            else:
                self.grad_weight.addmm_(grad_logits.T, hidden)
        elif hidden.is_cuda and torch.version.hip is None:
            # Summed by the product: 1.54 ms for 2,048 rows on an H100 (V 128,256, d 2,048), 3.15 if it is widened and added.
            if self.grad_weight is None:
                self.grad_weight = torch.mm(grad_logits.T, hidden, out_dtype=self.statistics)
            else:
                sums = self.grad_weight
                torch.ops.aten.addmm.dtype_out(sums, grad_logits.T, hidden, self.statistics, out=sums)
        else:
            product = torch.mm(grad_logits.T, hidden).to(self.statistics)
            self.grad_weight = product if self.grad_weight is None else self.grad_weight.add_(product)

    def hidden_gradient(self, grad_logits: Tensor, out: Tensor) -> None:
        """out = grad_logits weight."""
        if self.compiled:
            products.input_gradient([grad_logits], [self.weight], out, self.rounded)
        else:
            torch.mm(grad_logits, self.weight, out=out)

    def weight_gradient(self, wanted: bool) -> Tensor:
        """The sum so far: zeros where there were no rows, nothing where it is not wanted."""
        if not wanted:
            return self.weight.new_empty(0, dtype=self.statistics)
        if self.grad_weight is None:
            return torch.zeros(self.weight.shape, dtype=self.statistics, device=self.weight.device)
        return self.grad_weight


def _run_total(hidden, weight, labels, step, for_hidden: bool, for_weight: bool):
    chunks = _Chunks(hidden, weight, labels, step)
    total = torch.zeros((), dtype=chunks.statistics, device=hidden.device)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if for_hidden else hidden.new_empty(0)
    for start, stop in chunks.spans():
        losses, grad_logits = chunks.losses(start, stop, for_hidden or for_weight)
        total += losses.sum()
        grad_logits = grad_logits.to(hidden.dtype)
        if for_hidden:
            chunks.hidden_gradient(grad_logits, grad_hidden[start:stop])
        if for_weight:
            chunks.add_to_weight(grad_logits, start, stop)
    return total, grad_hidden, chunks.weight_gradient(for_weight)


def _fake_total(hidden, weight, labels, step, for_hidden, for_weight):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shapes = (hidden.shape if for_hidden else (0,), weight.shape if for_weight else (0,))
    return hidden.new_empty((), dtype=wide), hidden.new_empty(shapes[0]), hidden.new_empty(shapes[1], dtype=wide)


def _keep_total(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output)  # the total for what it was computed from: the gradients are constants to autograd
    ctx.dtype = inputs[1].dtype


def _total_gradients(ctx, upstream, *_):
    # Not in place: a second backward pass through a retained graph must find them as they were.
    grads = (
        (grad.to(upstream.dtype) * upstream).to(ctx.dtype) if needed else None
        for grad, needed in zip(ctx.saved_tensors[1:], ctx.needs_input_grad[:2], strict=True)
    )
    return *grads, None, None, None, None


def _run_rows(hidden, weight, labels, step):
    chunks = _Chunks(hidden, weight, labels, step)
    losses = torch.empty(len(hidden), dtype=chunks.statistics, device=hidden.device)
    for start, stop in chunks.spans():
        losses[start:stop] = chunks.losses(start, stop, False)[0]
    return losses


def _fake_rows(hidden, weight, labels, step):
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


def _keep_rows(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.step = inputs[3]


def _rows_gradients(ctx, upstream):
    needed = ctx.needs_input_grad[:2]
    grads = _rows_backward(upstream, *ctx.saved_tensors, ctx.step, *needed)
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


def _run_rows_backward(upstream, hidden, weight, labels, step, for_hidden: bool, for_weight: bool):
    chunks = _Chunks(hidden, weight, labels, step)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if for_hidden else hidden.new_empty(0)
    for start, stop in chunks.spans():
        _, grad_logits = chunks.losses(start, stop, True)
        grad_logits = grad_logits.mul_(upstream[start:stop, None]).to(hidden.dtype)
        if for_hidden:
            chunks.hidden_gradient(grad_logits, grad_hidden[start:stop])
        if for_weight:
            chunks.add_to_weight(grad_logits, start, stop)
    return grad_hidden, chunks.weight_gradient(for_weight).to(weight.dtype)


def _fake_rows_backward(upstream, hidden, weight, labels, step, for_hidden, for_weight):
    shapes = (hidden.shape if for_hidden else (0,), weight.shape if for_weight else (0,))
    return hidden.new_empty(shapes[0]), weight.new_empty(shapes[1])


_total = registry.operator(
    "linear_cross_entropy_total(Tensor hidden, Tensor weight, Tensor labels, str step, bool for_hidden, bool for_weight)"
    " -> (Tensor, Tensor, Tensor)",
    _run_total, _fake_total, keep=_keep_total, backward=_total_gradients,
)  # fmt: skip
_rows = registry.operator(
    "linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor labels, str step) -> Tensor",
    _run_rows, _fake_rows, keep=_keep_rows, backward=_rows_gradients,
)  # fmt: skip
_rows_backward = registry.operator(
    "linear_cross_entropy_rows_backward(Tensor upstream, Tensor hidden, Tensor weight, Tensor labels, str step, "
    "bool for_hidden, bool for_weight) -> (Tensor, Tensor)",
    _run_rows_backward, _fake_rows_backward,
)  # fmt: skip

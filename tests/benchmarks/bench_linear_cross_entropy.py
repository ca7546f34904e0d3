"""The loss from hidden states beside PyTorch's, forward and both gradients: tokens x d by vocabulary x d.

S2's shape of a step (4,096 x 512, 8,192 words), and four times the words for a quarter of the tokens, in fp32 and bf16.
PyTorch's are F.cross_entropy of F.linear, and, from 2.13 on, F.linear_cross_entropy in chunks as its options choose them. All
sides alternate in one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels.allocator import keep_pages
from mmcore.kernels.linear_cross_entropy import linear_cross_entropy
from tests.benchmarks import common

SHAPES = {"S2": (4096, 512, 8192), "more words": (1024, 512, 32_768)}
OURS = "ours"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def sides() -> dict[str, Loss]:
    found: dict[str, Loss] = {OURS: linear_cross_entropy, "F.cross_entropy(F.linear)": whole}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = lambda h, w, y: F.linear_cross_entropy(h, w, y, options=options)
    return found


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    value = loss(hidden, weight, labels)
    return value, *torch.autograd.grad(value, (hidden, weight))


def largest_error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Of the loss and of both gradients, against fp64 and beside the largest number of each."""
    return [float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in zip(found, exact, strict=True)]


def measure(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    tokens, width, words = shape
    torch.manual_seed(common.SEED)
    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(words, width) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(words, (tokens,))
    few = hidden[:256].detach().requires_grad_()
    exact = gradients(whole_in_fp64, few.double(), weight.double(), labels[:256])
    losses, times = sides(), {}
    for measured in [False] + [True] * rounds:
        for name, loss in losses.items():
            start = time.perf_counter()
            gradients(loss, hidden, weight, labels)
            if measured:
                times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    found = {}
    for name, loss in losses.items():
        median = common.figure(times[name])
        found[name] = {
            "ms": median,
            "gflop_s": 6 * tokens * width * words / median.median / 1e6,
            "memory_mb": common.extra_memory(lambda loss=loss: gradients(loss, hidden, weight, labels)) / 1e6,
            "errors_of_loss_and_gradients": largest_error(gradients(loss, few, weight, labels[:256]), exact),
            "time_over_ours": common.ratio(times[name], times[OURS]),
        }
    return found


def whole_in_fp64(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def main() -> None:
    options = common.parser(__doc__.splitlines()[0]).parse_args()
    keep_pages()
    results: dict[str, Any] = {}
    for label, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            row = results[f"{label} {shape} {str(dtype).removeprefix('torch.')}"] = measure(shape, dtype, options.rounds)
            print(f"{label}, {shape}, {dtype}", flush=True)
            for name, side in row.items():
                errors = ", ".join(f"{error:.1e}" for error in side["errors_of_loss_and_gradients"])
                print(
                    f"  {name:26} {side['ms']:8.1f} ms  {side['gflop_s']:6.0f} GFLOP/s  {side['memory_mb']:7.0f} MB beside the"
                    f" inputs  errors {errors}  time over ours {side['time_over_ours']:.2f}",
                    flush=True,
                )
    common.write(options.json, {"environment": common.environment(), "results": results})


if __name__ == "__main__":
    main()

"""What a measurement of the memories' health costs, beside a training step.

    python -m tests.benchmarks.bench_health [--shape S2] [--context 1024] [--rounds 5] [--device cpu]

A step is forward, backward and fused AdamW over --tokens tokens; a measurement reads one window of the same context.
They take turns; printed are medians, and the share of all time that measurements take at training.health_every's
default of 500 steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import SimpleNamespace

import numpy as np
import torch

from mmcore.config import TrainingConfig
from mmcore.kernels.allocator import keep_pages
from mmcore.training.health import measure
from mmcore.training.optimizer import build_optimizer
from mmcore.training.step import autocast
from mmcore.training.throughput import synchronize
from tests.benchmarks import common


def main() -> None:
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=common.SHAPES, default="S2")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    shape, device = common.SHAPES[asked.shape], torch.device(asked.device)
    precision = "bf16" if device.type == "cuda" else "fp32"
    keep_pages()
    model = common.build_ours(shape, asked.context).to(device)
    optimizer = build_optimizer(model, TrainingConfig())
    draw = np.random.default_rng(common.SEED)
    size = (max(1, asked.tokens // asked.context), asked.context + 1)
    tokens = torch.from_numpy(draw.integers(0, shape.vocab_size, size)).to(device)
    row = SimpleNamespace(
        tokens=tokens[0].cpu().numpy(), documents=np.zeros(size[1], np.int32), trained=np.ones(size[1], bool)
    )

    def step() -> None:
        with autocast(device, precision):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:], delay=100, reduction="sum") / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds: dict[str, list[float]] = {"step": [], "health": []}
    for turn in range(asked.rounds + 1):
        for name, work in (("step", step), ("health", lambda: measure(model, [row], device, precision))):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    one, other = (statistics.median(seconds[name]) for name in ("step", "health"))
    every = TrainingConfig().health_every
    print(f"{shape.label}, context {asked.context}: a step of {asked.tokens} tokens {one:.3f} s, a measurement {other:.3f} s")
    print(f"every {every} steps: {other / (every * one):.3%} of the time")


if __name__ == "__main__":
    main()

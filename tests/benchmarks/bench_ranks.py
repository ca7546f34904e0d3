"""Training steps of one and of two ranks on this CPU: what a second rank adds, and what the sharding costs.

    python -m tests.benchmarks.bench_ranks [--shape S1] [--tokens 2048] [--rounds 3] [--json FILE]

A step is the trainer's own: forward, backward, sums over the ranks, clipping, fused AdamW, on as many tokens for every
rank. The sides are one rank on one thread, one rank on two threads (what the cores give without ranks), and two ranks of
one thread each; every round starts them anew, one after the other. Two ranks can at best be twice as fast as one on one
thread, and less where two busy cores share caches, memory or clock: the last side is two processes that train for
themselves.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from mmcore.config import build_recipe
from mmcore.distributed.mesh import World, start_world, stop_world
from mmcore.kernels.allocator import keep_pages
from mmcore.training.optimizer import build_optimizer
from mmcore.training.setup import build
from mmcore.training.step import accumulate, clip
from tests.benchmarks import common
from tests.distributed.scenarios import Batch
from tests.helpers.ranks import run_ranks

CONTEXT, STEPS = 512, 5
SIDES = {
    # name: (ranks, threads of each, whether they train together)
    "1 rank, 1 thread": (1, 1, True),
    "1 rank, 2 threads": (1, 2, True),
    "2 ranks": (2, 1, True),
    "2 processes apart": (2, 1, False),
}


def steps(shape: common.Shape, tokens: int, threads: int, together: bool) -> list[float]:
    """Seconds of each step on this rank; the first, which warms up, is left out."""
    torch.set_num_threads(threads)
    keep_pages()
    cpu = torch.device("cpu")
    world = start_world(cpu)
    rows, alone = tokens // CONTEXT, world if together else World()
    recipe = build_recipe({
        "model": {
            "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "max_position_embeddings": CONTEXT,
        },
        "training": {"batch_size": rows * alone.size, "sequence_length": CONTEXT, "steps": STEPS},
    })  # fmt: skip
    model = build(recipe, cpu, "fp32", world=alone)
    optimizer = build_optimizer(model, recipe.training)
    words = torch.randint(shape.vocab_size, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(world.rank))
    batch = Batch(words[:, :-1].contiguous(), words[:, 1:].contiguous(), torch.zeros(rows, CONTEXT, dtype=torch.int32))
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        found = accumulate(model, [batch], 64, cpu, "fp32", alone, recipe.distributed)
        clip(model, found.gradient_norm, 1.0)
        optimizer.step()
        times.append(time.perf_counter() - start)
    stop_world(world)
    return times[1:]


def speed(shape: common.Shape, tokens: int, side: str) -> float:
    """Tokens a second of all ranks of a side: of ranks that train together the slowest counts, apart each for itself."""
    ranks, threads, together = SIDES[side]
    found = [statistics.median(times) for times in run_ranks(steps, ranks, shape, tokens, threads, together)]
    return ranks * tokens / max(found) if together else sum(tokens / each for each in found)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="S1")
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank in a step")
    parser.set_defaults(rounds=3)
    asked = parser.parse_args()
    shape = common.SHAPES[asked.shape]
    turns = {side: lambda side=side: speed(shape, asked.tokens, side) for side in SIDES}
    speeds = common.take_turns(turns, asked.rounds, warm_up=0)
    report: dict[str, Any] = {"environment": common.environment(), "shape": dataclasses.asdict(shape), "context": CONTEXT,
                              "tokens_per_rank": asked.tokens, "tokens_per_second": {}, "ratios": {}}  # fmt: skip
    one = "1 rank, 1 thread"
    for side, values in speeds.items():
        report["tokens_per_second"][side] = common.figure(values)
        report["ratios"][f"{side} / {one}"] = common.ratio(values, speeds[one])
        print(f"{side:<20} {common.figure(values):7.0f} tokens/s   {common.ratio(values, speeds[one]):.2f} of {one}")
    cost = common.ratio(speeds["2 ranks"], speeds["2 processes apart"])
    report["ratios"]["2 ranks / 2 processes apart"] = cost
    print(f"2 ranks / 2 processes apart: {cost:.2f}")
    common.write(asked.json, report)


if __name__ == "__main__":
    main()

"""Planned against measured peak memory of a run on CPU ranks.

    python -m tests.benchmarks.bench_plan [--shape S1] [--cases NAME ...] [--live] [--json FILE]

Every case is a run of the real trainer, data, checkpoints and all, in fresh processes. Measured is the highest resident
memory of any rank; planned is what `mm pretrain --plan` says. --live runs each case once more to add up what PyTorch had
allocated at its peak (its profiler, over the whole run), which tells a wrong formula from an allocator that wastes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mmcore import planning
from mmcore.config import Recipe, build_recipe
from tests.benchmarks import common
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_run import write_text

TOKENS = 2048
"""Of a rank in a step."""

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "synchronous": {"asynchronous": False},
    "accumulated": {"micro_batches": 4},
    "selective": {"checkpointing": "selective"},
    "full": {"checkpointing": "full"},
    "full, accumulated": {"checkpointing": "full", "micro_batches": 4},
    "transformer": {"kind": "llama"},
    "2 ranks": {"ranks": 2},
    "2 ranks, accumulated": {"ranks": 2, "micro_batches": 4},
    "2 ranks, reduced each time": {"ranks": 2, "micro_batches": 4, "reduction": "micro_batch"},
    "2 ranks, full": {"ranks": 2, "checkpointing": "full"},
}


def recipe_of(shape: common.Shape, folder: Path, context: int, *, kind: str = "memory_mosaics_v2", ranks: int = 1,
              micro_batches: int = 1, checkpointing: str = "none", asynchronous: bool = True,
              reduction: str = "step") -> Recipe:  # fmt: skip
    """A run of four steps that saves after the second, and so trains on while it saves."""
    batch = TOKENS // context
    return build_recipe({
        "name": "planned",
        "model": {
            "model_type": kind, "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "max_position_embeddings": context,
        },
        "tokenizer": {"train_vocab_size": 384},
        "data": {"sources": [{"path": str(folder / "text.txt")}], "cache": str(folder / "cache"), "workers": 1},
        "training": {
            "sequence_length": context, "batch_size": ranks * batch, "micro_batch_size": batch // micro_batches, "steps": 4,
            "validation_every": 0, "validation_tokens": context, "health_every": 0, "device": "cpu",
        },
        "checkpoint": {"folder": str(folder / "run"), "every": 2, "keep_last": 1, "asynchronous": asynchronous},
        "distributed": {"activation_checkpointing": checkpointing, "gradient_reduction": reduction},
    })  # fmt: skip


def resident(recipe: Recipe) -> float:
    """Run it on this rank: the highest resident memory, in MB."""
    from mmcore.training.setup import prepare_trainer

    prepare_trainer(recipe).fit()
    return common.memory("VmHWM")


def allocated(recipe: Recipe) -> float:
    """The same: the most bytes that PyTorch had allocated at once, in MB."""
    from mmcore.training.setup import Start, prepare_trainer

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        prepare_trainer(recipe, start=Start(overwrite=True)).fit()
    now = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 1e6


def measure(shape: common.Shape, context: int, case: dict[str, Any], live: bool) -> dict[str, Any]:
    """Plan and run of one case."""
    ranks = case.get("ranks", 1)
    with tempfile.TemporaryDirectory(prefix="mm-plan-") as folder:
        write_text(Path(folder) / "text.txt", 3000)
        recipe = recipe_of(shape, Path(folder), context, **case)
        machine = planning.parse_machine(f"{ranks}xcpu")
        parts = planning.memory_per_device(recipe, machine, recipe.training.micro_batch_size)
        measured = max(run_ranks(resident, ranks, recipe))
        most = max(run_ranks(allocated, ranks, recipe)) if live else None
    planned = parts["total"] / 1e6
    return {"planned_megabytes": planned, "measured_megabytes": measured, "planned / measured": planned / measured,
            "allocated_megabytes": most,
            "parts_megabytes": {name: value / 1e6 for name, value in parts.items() if name != "total"}}  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="S1")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--live", action="store_true", help="also what PyTorch had allocated")
    arguments = parser.parse_args()
    shape = common.SHAPES[arguments.shape]
    report = {"environment": common.environment(), "shape": shape, "context": arguments.context, "tokens": TOKENS, "cases": {}}
    print(f"{'case':<28} {'planned':>8} {'measured':>8} {'ratio':>6}  MB")
    for name in arguments.cases:
        found = report["cases"][name] = measure(shape, arguments.context, CASES[name], arguments.live)
        more = f"  allocated {found['allocated_megabytes']:.0f}" if arguments.live else ""
        print(f"{name:<28} {found['planned_megabytes']:8.0f} {found['measured_megabytes']:8.0f} "
              f"{found['planned / measured']:6.2f}{more}", flush=True)
        common.write(arguments.json, report)  # a later case may fail


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

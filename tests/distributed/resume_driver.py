"""Run as a program: training on 2 ranks, stopped and resumed on 2, and resumed on 1, 3 and 4.

    python -m tests.distributed.resume_driver FOLDER

Leaves results.json: for every session its ranks, the samples (as hashes of their tokens) and the loss of every step, and
how it ended. test_resume.py says what must hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mmcore.config import build_recipe
from mmcore.distributed.mesh import World
from mmcore.training import trainer as trainer_module
from mmcore.training.setup import Start, prepare_trainer
from tests.helpers.forked_ranks import run_ranks
from tests.helpers.tiny_run import tiny_values

STEPS = 6


def recipe_in(folder: Path, run: str) -> dict[str, Any]:
    """12 sequences a step divide by 1, 2, 3 and 4 ranks; 389 rows of the embedding by none."""
    values = tiny_values(folder, steps=STEPS, batch_size=12, micro_batch_size=None, validation_every=0)
    values["model"]["vocab_size"] = 389
    values["tokenizer"] = {"train_vocab_size": 384}
    values["checkpoint"] = {"folder": str(folder / run), "every": 2, "keep_last": 0}
    return values


def session(world: World, values: dict[str, Any], resume: bool, stop_at: int | None) -> dict[str, Any]:
    """Train; the last rank gets a SIGTERM in step `stop_at`. What this rank saw."""
    seen: dict[int, Any] = {}
    accumulate = trainer_module.accumulate

    def watched(model, batches, *arguments):
        result = accumulate(model, batches, *arguments)
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for batch in batches for row in batch.tokens]
        seen[trainer.step + 1] = {"rows": rows, "loss": result.loss}
        if trainer.step + 1 == stop_at and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # until the thread that watches for signals has heard it
        return result

    trainer_module.accumulate = watched
    trainer = prepare_trainer(build_recipe(values), start=Start(resume=resume))
    first = trainer.step
    outcome = trainer.fit()
    return {"steps": seen, "first": first, "status": outcome.status, "step": outcome.step, "saved": str(outcome.checkpoint)}


def main(folder: Path) -> None:
    results = {}

    def train(name: str, run: str, ranks: int, resume: bool = True, stop_at: int | None = None) -> None:
        arguments = (recipe_in(folder, run), resume, stop_at)
        results[name] = run_ranks(ranks, session, *arguments, connect=False, timeout=400)

    def copy(run: str, keep: tuple[int, ...]) -> None:
        shutil.copytree(folder / "unbroken", folder / run, ignore=shutil.ignore_patterns(".lock"))
        for path in (folder / run / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) not in keep:
                shutil.rmtree(path)

    train("unbroken", "unbroken", 2, resume=False)
    copy("stopped", keep=(2,))
    train("stopped", "stopped", 2, stop_at=5)
    train("resumed", "stopped", 2)
    for ranks in (1, 3, 4):
        copy(f"on-{ranks}", keep=(2, 4))
        damaged = folder / f"on-{ranks}" / "checkpoints" / "step-000004" / "optimizer-rank00002-of-00002.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])  # passed over: it goes on from step 2
        train(f"on {ranks}", f"on-{ranks}", ranks)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

"""What two ranks do about steps that go wrong, in one process group: called through tests.helpers.ranks."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from mmcore.config import build_recipe
from mmcore.distributed.shards import whole
from mmcore.errors import MMError
from mmcore.training import events
from mmcore.training.setup import Start, prepare_trainer
from tests.helpers.tiny_run import tiny_values


def recipe(folder, shared, **training):
    values = tiny_values(Path(shared), validation_every=0, **training)
    values["checkpoint"] |= {"folder": str(folder), "every": 2}
    return build_recipe(values)


def hurt(trainer, bad, rank, kind):
    """Let one rank's loss or gradient go wrong in these steps; the others know nothing of it."""
    if trainer.job.world.rank != rank:
        return
    plain = trainer.model.loss

    def loss(*arguments, **settings):
        found = plain(*arguments, **settings)
        if trainer.model.training and trainer.step + 1 in bad and not trainer.faults.counts.rollbacks:
            if kind == "gradient":
                found.register_hook(lambda gradient: gradient * math.nan)
            else:
                found = found * {"loss": math.nan, "spike": 3.0}[kind]
        return found

    trainer.model.loss = loss


def weights(trainer):
    return {name: whole(parameter.detach()).numpy().copy() for name, parameter in trainer.model.named_parameters()}


def run_one(folder, shared, bad, rank, kind, profile=None, start=None, **training):
    heard = []
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # the last run's store may not be gone yet
    trainer = prepare_trainer(recipe(folder, shared, **training), listeners=[heard.append], profile=profile, start=start)
    hurt(trainer, bad, rank, kind)
    seen = {}

    def remember(event):
        if isinstance(event, (events.StepDone, events.Skipped)):
            seen[event.step] = (whole(trainer.model.lm_head.weight.detach()).clone(), trainer.position)

    trainer.listeners.append(remember)
    ended = {"error": None}
    trainer.resources.callback(lambda: ended.update(weights=weights(trainer)))
    try:
        ended["status"] = trainer.fit().status
    except MMError as error:
        ended["error"] = str(error)
    ended["still"] = [step for step in seen if step - 1 in seen and torch.equal(seen[step][0], seen[step - 1][0])]
    ended["positions"] = {step: position for step, (_, position) in seen.items()}
    ended["skipped"] = [(e.step, e.reason) for e in heard if isinstance(e, events.Skipped)]
    ended["back"] = [(e.step, e.spike_step, e.samples) for e in heard if isinstance(e, events.RolledBack)]
    ended["losses"] = {e.step: e.loss for e in heard if isinstance(e, events.StepDone)}
    ended["health"] = [e.memories for e in heard if isinstance(e, events.Health)]
    return ended


def scenes(folder: str, shared: str) -> dict:
    """All that is asked of two ranks, one run after another."""
    torch.set_num_threads(1)
    base, found = Path(folder), {}
    found["gradient"] = run_one(base / "gradient", shared, {3, 4}, 1, "gradient", on_nonfinite="skip")
    found["loss"] = run_one(base / "loss", shared, {5}, 1, "loss", steps=8)
    found["spike"] = run_one(
        base / "spike", shared, {6}, 1, "spike", steps=9, spike_rollback={"nats": 1.0, "after_steps": 2, "max_rollbacks": 1}
    )
    found["sight"] = run_one(base / "sight", shared, (), 0, "loss", profile=(2, 3), steps=4, health_every=2)
    found["resumed"] = run_one(base / "loss", shared, (), 0, "loss", start=Start(resume=True), steps=8)
    return found

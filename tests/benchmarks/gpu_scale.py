"""What training at scale asks of one card: 8-bit products beside bf16 (part h), planned beside measured memory (part i)."""

from __future__ import annotations

import functools
from typing import Any

from mmcore import planning
from mmcore.config import Recipe, load_recipe
from tests.benchmarks.gpu_models import RECIPES, TINY, job, train_until_it_fits
from tests.benchmarks.gpu_timing import Place, attempt

LENGTH = 4096


def precisions(place: Place, report: dict[str, Any]) -> None:
    """Compiled steps of the recipes' models at 4,096 tokens in bf16 and in float8, and how much faster float8 is."""
    for name in place.pick(["1.5b", "350m", "124m", "1.5b-transformer", "350m-transformer", "124m-transformer"], ["tiny"]):
        config, length, batch, checkpointing = job(place, name)
        found = {}
        for precision in ("fp8", "bf16"):
            work = functools.partial(train_until_it_fits, place, config, length, batch, checkpointing, place.gpu, precision)
            result = found[precision] = attempt(report, f"{name} {precision}", work)
            place.free()
            batch, checkpointing = result.get("batch", batch), result.get("checkpointing", checkpointing)  # equal for both
        if all("tokens_per_second" in result for result in found.values()):
            report[f"{name} fp8 / bf16"] = found["fp8"]["tokens_per_second"] / found["bf16"]["tokens_per_second"]


def memory(place: Place, report: dict[str, Any]) -> None:
    """The largest recipe that fits one card, 1.5b, one micro-batch a step: the highest allocation beside the plan's."""
    for checkpointing, batch in place.pick([("none", 1), ("none", 2), ("selective", 2), ("full", 8)], [("none", 2)]):
        work = functools.partial(_planned_and_measured, place, checkpointing, batch)
        attempt(report, f"{batch} x {checkpointing}", work)
        place.free()


def _planned_and_measured(place: Place, checkpointing: str, batch: int) -> dict[str, Any]:
    recipe = _recipe(checkpointing, batch)
    config, length = (TINY, 24) if place.tiny else (recipe.model, LENGTH)
    planned = planning.memory_per_device(recipe, planning.parse_machine("1xH100"), batch)["total"] / 1e9
    found = train_until_it_fits(place, config, length, batch, checkpointing, False)
    fitted = found["batch"] == batch and found["checkpointing"] == checkpointing
    measured = found["peak_gb"] if fitted else None
    return {"planned_gb": planned, "peak_gb": measured, "planned / peak": measured and planned / measured}


def _recipe(checkpointing: str, batch: int) -> Recipe:
    return load_recipe(RECIPES / "1.5b.yaml", [
        f"training.sequence_length={LENGTH}", f"model.max_position_embeddings={LENGTH}", f"training.batch_size={batch}",
        f"training.micro_batch_size={batch}", f"distributed.activation_checkpointing={checkpointing}",
    ])  # fmt: skip

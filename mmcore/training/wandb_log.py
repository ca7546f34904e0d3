"""The metrics of a run at Weights & Biases, for those who keep theirs there (extra `wandb`)."""

from __future__ import annotations

import importlib.util
import uuid
from pathlib import Path

from mmcore.config import Recipe
from mmcore.errors import ConfigError
from mmcore.training.events import Event
from mmcore.training.metrics import as_line, numbers, wanted
from mmcore.training.run_folder import disk_errors


def check_installed(recipe: Recipe) -> None:
    """Raise ConfigError where the recipe wants W&B and the package is missing."""
    if recipe.training.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "training.wandb is set, but the package wandb is not installed: pip install 'mm[wandb]', or set "
            "training.wandb=null"
        )


class WandB:
    """Sends the numbers of metrics.jsonl to a project; a resumed run goes on in the same place.

    WANDB_MODE=offline, and W&B's other variables, work as its manual says.
    """

    def __init__(self, recipe: Recipe, log_every: int):
        import wandb

        folder = recipe.run_folder
        self.log_every = log_every
        self._run = wandb.init(
            project=recipe.training.wandb, name=recipe.name, id=_identity(folder), resume="allow", dir=str(folder),
            config=recipe.as_dict(), settings={"console": "off"},  # what ranks say is in logs/
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # W&B's own count cannot go back, as a roll-back does

    def __call__(self, event: Event) -> None:
        if wanted(event, self.log_every):
            line = as_line(event)
            named = {f"{line['kind']}/{name}": value for name, value in numbers(line).items()}
            self._run.log(named | {"step": line["step"]})

    def close(self) -> None:
        self._run.finish()


def _identity(folder: Path) -> str:
    """The run's name at W&B, drawn once and kept in its folder."""
    path = folder / "wandb-id"
    with disk_errors(path):
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()

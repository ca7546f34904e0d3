"""One model trained on one language, or on real text, by the trainer that trains everything; and what came of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.claims.languages import Language, Stream
from mmcore.claims.measure import accuracy, answer_loss, checkpoints_of_a_curve
from mmcore.config import Recipe, load_recipe
from mmcore.errors import ConfigError
from mmcore.kernels.allocator import keep_pages
from mmcore.model import LanguageModel
from mmcore.model.accounting import flops_per_token, parameters, read_flops_per_token
from mmcore.training.checks import choose_device, choose_precision
from mmcore.training.events import Event, StepDone, Validated
from mmcore.training.job import Job
from mmcore.training.setup import Start, build, prepare_trainer
from mmcore.training.trainer import Trainer


@dataclass(frozen=True)
class Task:
    """What is learned, and how it is measured."""

    name: str
    recipe: str
    """File in recipes/claims, without ending; the twin's has `-transformer` behind it."""
    language: Language | None
    """None: real text."""
    trained_size: int = 0
    """Size of the largest episode in training."""
    sizes: tuple[int, ...] = ()
    """Sizes that are measured."""
    episodes: int = 128
    questions: int = 4
    """In each episode that is measured."""
    tuned_factor: int = 0
    """Fine-tuning reads samples, and is measured on episodes, so many times longer; 0: there is none."""
    tuned_steps: tuple[int, ...] = (0, 1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Trial:
    """A training run: which model on which task, with which learning rate and seed."""

    task: str
    model: str
    recipe: Path
    settings: tuple[str, ...]
    """`section.key=value` over the recipe."""
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.model}/rate {self.rate:g}/seed {self.seed}"

    def load(self, folder: Path) -> Recipe:
        """The recipe of this run, whose folder lies under `folder`."""
        own = (f"training.learning_rate={self.rate:g}", f"training.seed={self.seed}", f"data.seed={self.seed}",
               f"checkpoint.folder={folder / self.name.replace(' ', '-')}")  # fmt: skip
        return load_recipe(self.recipe, [*self.settings, *own])


def run(trial: Trial, task: Task, folder: Path) -> dict[str, Any]:
    """Train and measure; plain values. Raises ConfigError, DataError."""
    keep_pages()
    recipe, started = trial.load(folder), time.perf_counter()
    found: dict[str, Any] = {
        "parameters": parameters(recipe.model)["total"],
        "flops_per_token": flops_per_token(recipe.model)
        + read_flops_per_token(recipe.model, recipe.training.sequence_length),
        "steps": recipe.training.total_steps,
        "tokens": recipe.training.total_steps * recipe.training.tokens_per_step,
    }
    found |= _on_text(recipe) if task.language is None else _on_language(recipe, task, task.language)
    return found | {"seconds": time.perf_counter() - started}


def _on_text(recipe: Recipe) -> dict[str, Any]:
    curve: list[dict[str, float]] = []

    def listen(event: Event) -> None:
        if isinstance(event, Validated):
            curve.append({"step": event.step, "loss": event.loss, "bits_per_byte": event.bits_per_byte})

    prepare_trainer(recipe, listeners=[listen], start=Start(overwrite=True)).fit()
    return {"loss": curve[-1]["loss"], "bits_per_byte": curve[-1]["bits_per_byte"], "curve": curve}


def _on_language(recipe: Recipe, task: Task, language: Language) -> dict[str, Any]:
    if recipe.model.vocab_size != language.vocabulary:
        raise ConfigError(
            f"{task.recipe}: model.vocab_size is {recipe.model.vocab_size} and the language has {language.vocabulary} tokens"
        )
    device = choose_device(recipe.training.device)
    model = build(recipe, device, choose_precision(recipe.training.precision, device))
    curve: list[dict[str, float]] = []

    def look(step: int, loss: float) -> None:
        right, asked = accuracy(model, language, task.trained_size, 32, task.questions)
        curve.append({"step": step, "loss": loss, "accuracy": right / asked})

    _train(recipe, model, language, checkpoints_of_a_curve(recipe.training.total_steps), look)
    found = {"curve": curve, "loss": answer_loss(model, language, recipe.training.sequence_length)}
    found["accuracy"] = {size: _share(model, language, size, task) for size in task.sizes}
    if "long_term" in type(model.model.layers[0]).MEMORIES:
        found["accuracy_without_long_term"] = {
            size: _share(model, language, size, task, without=("long_term",)) for size in task.sizes
        }
    if task.tuned_factor:
        found["tuned"] = _tune(recipe, model, task, language)
    return found


def _share(model: LanguageModel, language: Language, size: int, task: Task, without: tuple[str, ...] = ()) -> float:
    right, asked = accuracy(model, language, size, task.episodes, task.questions, without)
    return right / asked


def _tune(recipe: Recipe, model: LanguageModel, task: Task, language: Language) -> dict[int, float]:
    """Accuracy at `tuned_factor` times the trained size after each number of `tuned_steps`: short tuning on longer
    samples at a tenth of the peak learning rate, as many tokens in a step as before."""
    training, factor = recipe.training, task.tuned_factor
    longer = dataclasses.replace(language, **{language.grows: getattr(language, language.grows) * factor})
    tuning = dataclasses.replace(
        recipe,
        training=dataclasses.replace(
            training, sequence_length=training.sequence_length * factor, steps=task.tuned_steps[-1], schedule="constant",
            batch_size=max(1, training.batch_size // factor), micro_batch_size=None, warmup_steps=0,
            learning_rate=training.learning_rate / 10,
        ),
        checkpoint=dataclasses.replace(recipe.checkpoint, folder=f"{recipe.run_folder}-tuned"),
    )  # fmt: skip
    size = task.trained_size * factor
    found = {0: _share(model, language, size, task)}

    def look(step: int, loss: float) -> None:
        found[step] = _share(model, language, size, task)

    _train(tuning, model, longer, task.tuned_steps, look)
    return found


def _train(
    recipe: Recipe, model: LanguageModel, language: Language, looks: list[int] | tuple[int, ...],
    look: Callable[[int, float], None],
) -> None:
    """Train `model` on the language as the recipe says, calling look(step, smoothed loss) after the steps of `looks`."""
    device = model.model.embed_tokens.weight.device

    def listen(event: Event) -> None:
        if isinstance(event, StepDone) and event.step in looks:
            look(event.step, event.smoothed_loss)

    training = recipe.training
    job = Job(
        recipe=recipe, model=model, samples=Stream(language, training.sequence_length, training.seed), device=device,
        precision=choose_precision(training.precision, device), config_json=config_json(recipe.model, torch.float32),
    )  # fmt: skip
    Trainer(job, [listen]).fit()

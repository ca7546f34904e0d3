"""From a recipe to a trainer that is ready to run.

What can be known without work is checked first (checks.py), so that a mistake costs seconds and leaves nothing
half-written; then tokenizer, data and model; the run's folder is written last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from mmcore.checkpoint.formats import Checkpoint, open_checkpoint
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.resolve import iterate_whole
from mmcore.config import Recipe
from mmcore.data.corpus import Corpus, prepare
from mmcore.data.loader import make_batch
from mmcore.data.packing import Samples
from mmcore.data.tokenizer import Tokenizer
from mmcore.distributed.mesh import World, world_from_environment
from mmcore.distributed.parallelize import parallelize
from mmcore.errors import CheckpointError, ConfigError
from mmcore.kernels.allocator import keep_pages
from mmcore.model import LanguageModel, build_model
from mmcore.model.accounting import training_flops_per_token
from mmcore.training import checks
from mmcore.training.events import Event, Listener, Notice, Preparing, Tokenizing
from mmcore.training.memory import explain_memory
from mmcore.training.metrics import HealthLines, JsonLines, TensorBoard, keep_lines_until
from mmcore.training.profile import Profile
from mmcore.training.run_folder import RunFolder, check_same_recipe, disk_errors
from mmcore.training.step import IGNORED
from mmcore.training.tokenizers import find_tokenizer
from mmcore.training.trainer import Job, Trainer, load_weights
from mmcore.training.wandb_log import WandB, check_installed


@dataclass(frozen=True)
class Start:
    """How a run begins."""

    resume: bool = False
    """Go on from the newest whole checkpoint of the run's folder, or start where there is none yet."""
    overwrite: bool = False
    """Remove what an earlier run left in the folder."""


def prepare_trainer(
    recipe: Recipe,
    *,
    stage: str = "pretrain",
    start: Start | None = None,
    listeners: Iterable[Listener] = (),
    profile: tuple[int, int] | None = None,
) -> Trainer:
    """A trainer for `recipe`, its run folder written, at step 0 or where the run left off.

    stage: pretrain, or finetune (weights and tokenizer of training.init_from; see finetune.py for its recipe).
    profile: the first and the last step to trace into the run's folder.
    Raises an MMError for every mistake that can be known before the first step.
    """
    start, listeners = start or Start(), list(listeners)

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    world = world_from_environment()
    checks.check_recipe(recipe)
    check_installed(recipe)
    device = checks.choose_device(recipe.training.device)
    precision = checks.choose_precision(recipe.training.precision, device)
    run = RunFolder(recipe.run_folder)
    run.check_writable()
    resumed = _find_start(recipe, run, start, tell)
    source = _source(recipe, run, stage) if resumed is None else None
    checks.check_memory(recipe, device)
    checks.check_disk(recipe)

    known = resumed if resumed is not None else source.tokenizer_path if source is not None else None
    tokenizer = find_tokenizer(recipe, known, lambda what: tell(Preparing(what)))
    corpus = prepare(recipe.data, tokenizer, progress=lambda done, total, rate: tell(Tokenizing(done, total, rate)))
    if device.type == "cpu":
        keep_pages()
    with explain_memory(recipe):
        tell(Preparing("building the model"))
        _remark(recipe, corpus, device, precision, tell)
        model = _build(recipe, device, source)
        trainer = Trainer(_job(recipe, stage, model, corpus, tokenizer, device, precision, world, tell), listeners)
        if resumed is not None:
            trainer.restore(resumed)
    _open_run_folder(trainer, run, tokenizer, corpus, start)
    if profile is not None:
        trainer.listeners.append(Profile(run.path / "profile", *profile, world, device, tell))
    return trainer


def _find_start(recipe: Recipe, run: RunFolder, start: Start, tell: Listener) -> Path | None:
    """The checkpoint to resume from, or None to begin at step 1. Raises ConfigError, CheckpointError."""
    if start.overwrite:
        return None
    if not start.resume:
        run.refuse_if_used()
        return None
    skipped: list[str] = []
    newest = next(iterate_whole(run.path, skipped.append), None)
    for sentence in skipped:
        tell(Notice(sentence))
    if newest is None and run.holds_checkpoints():
        raise CheckpointError(f"no checkpoint of {run.path} is whole ({'; '.join(skipped)}): start over with --overwrite")
    if newest is None:
        tell(Notice(f"{run.path} holds no checkpoint yet: starting from the beginning"))
        return None
    try:
        before = yaml.safe_load((newest / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        raise CheckpointError(f"{newest} has no readable recipe.yaml: go on from it with `mm finetune` instead") from None
    for sentence in check_same_recipe(before, recipe.as_dict(), newest):
        tell(Notice(sentence))
    return newest


def _source(recipe: Recipe, run: RunFolder, stage: str) -> Checkpoint | None:
    """The checkpoint that fine-tuning starts from. Raises ConfigError, CheckpointError."""
    init_from = recipe.training.init_from
    if stage == "pretrain":
        return None
    if init_from is None:
        raise ConfigError("the recipe has no training.init_from: name the checkpoint to go on from")
    source = open_checkpoint(init_from)
    if source.path.resolve().is_relative_to(run.path.resolve()):
        raise ConfigError(
            f"training.init_from {init_from} lies in the run's own folder {run.path}: choose another checkpoint.folder, "
            f"or another name"
        )
    return source


def _build(recipe: Recipe, device: torch.device, source: Checkpoint | None) -> LanguageModel:
    """The model with its first weights: drawn from the seed, or the source's."""
    with torch.device(device):
        model = build_model(recipe.model)
    if source is None:
        model.init_weights(recipe.training.seed)
    else:
        load_weights(model, source.tensors, source.path)
    return parallelize(model, recipe.distributed, recipe.training.compile)


def _job(
    recipe: Recipe,
    stage: str,
    model: LanguageModel,
    corpus: Corpus,
    tokenizer: Tokenizer,
    device: torch.device,
    precision: str,
    world: World,
    tell: Listener,
) -> Job:
    length = recipe.training.sequence_length
    samples = Samples(corpus.train, length, recipe.data.seed)
    if samples.cut:
        tell(Notice(f"{samples.cut} conversations are longer than {length} tokens: their ends are left out"))
    validation = _validation_batches(recipe, corpus, tell)
    return Job(
        recipe=recipe,
        model=model,
        samples=samples,
        validation=validation,
        bytes_per_token=bytes_per_label(validation, tokenizer),
        device=device,
        precision=precision,
        world=world,
        flops_per_token=training_flops_per_token(recipe.model, length),
        config_json=config_json(recipe.model, torch.float32, tokenizer.bos_id, _end_ids(tokenizer, recipe.data.kind)),
        files=tokenizer.files(),
        data_identity=corpus.fingerprint["identity"],
        training_tokens=corpus.train.tokens,
        stage=stage,
    )


def _remark(recipe: Recipe, corpus: Corpus, device: torch.device, precision: str, tell: Listener) -> None:
    """Say what is allowed but may not be meant."""
    if precision == "bf16" and device.type == "cpu":
        tell(Notice("training.precision is bf16, which a CPU computes 8 to 130 times slower than fp32"))
    for path, found in corpus.fingerprint["files"].items():
        if found["skipped"] and path != "python-library":
            endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in found["skipped"].items())
            tell(Notice(f"{path} holds files that are no text and were left out: {endings}"))


def _end_ids(tokenizer: Tokenizer, kind: str) -> int | list[int] | None:
    """Where generation ends: the end of the text, and in a conversation the end of a turn too."""
    turn = tokenizer.special("<|eot_id|>") if kind == "conversations" else None
    if turn is None:
        return tokenizer.eos_id
    return turn if tokenizer.eos_id is None else [tokenizer.eos_id, turn]


def _validation_batches(recipe: Recipe, corpus: Corpus, tell: Listener) -> Sequence:
    """Windows spread over the held-out text, the same at every validation of every run on this data."""
    training = recipe.training
    if corpus.validation is None:
        tell(Notice("no text is held out, so this run has no validation loss: see data.validation_fraction"))
        return ()
    count = max(1, int(training.validation_tokens // training.sequence_length))
    samples = Samples(corpus.validation, training.sequence_length, shuffle=False, limit=count)
    size = training.micro_batch_size or training.batch_size
    starts = range(0, len(samples), size)
    return [make_batch(samples, range(start, min(start + size, len(samples)))) for start in starts]


def bytes_per_label(batches: Sequence, tokenizer: Tokenizer) -> float | None:
    """Bytes of text behind a label of `batches`, on average; end tokens count as labels of no bytes."""
    lengths = tokenizer.byte_lengths()
    labels = [batch.labels[batch.labels != IGNORED].numpy() for batch in batches]
    if not labels:
        return None
    return float(np.mean(lengths[np.concatenate(labels)], dtype=np.float64))


def _open_run_folder(trainer: Trainer, run: RunFolder, tokenizer: Tokenizer, corpus: Corpus, start: Start) -> None:
    """Write what identifies the run, and let its metrics begin, or go on, at the trainer's step."""
    trainer.resources.enter_context(run.lock())
    if start.overwrite:
        run.clear()
    run.write_identity(trainer.recipe, corpus.fingerprint)
    with disk_errors(run.path):
        tokenizer.save(run.tokenizer)
        if trainer.step == 0 and run.tensorboard.exists():
            shutil.rmtree(run.tensorboard)
    for path in (run.metrics, run.health):
        keep_lines_until(path, trainer.step)
    every = trainer.recipe.training.log_every
    writers = [JsonLines(run.metrics, every), HealthLines(run.health), TensorBoard(run.tensorboard, every, trainer.step)]
    if trainer.recipe.training.wandb is not None:
        writers.append(WandB(trainer.recipe, every))
    trainer.listeners = [*writers, *trainer.listeners]

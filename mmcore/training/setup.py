"""From a recipe to a trainer that is ready to run.

What can be known without work is checked first (checks.py), so that a mistake costs seconds and leaves nothing
half-written; then tokenizer, data and model; the run's folder is written last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from mmcore.checkpoint.contents import STATE
from mmcore.checkpoint.ends import all_ends, known_ends, one_or_more
from mmcore.checkpoint.formats import Checkpoint, open_checkpoint
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.resolve import iterate_whole
from mmcore.checkpoint.untrusted import read_json
from mmcore.config import Recipe
from mmcore.data.corpus import Corpus, prepare
from mmcore.data.documents import PYTHON_LIBRARY, left_out
from mmcore.data.loader import make_batch
from mmcore.data.packing import Samples
from mmcore.data.tokenizer import Tokenizer
from mmcore.distributed.float8 import use_float8
from mmcore.distributed.mesh import World, start_world, stop_world, world_from_environment
from mmcore.distributed.messages import Messages
from mmcore.distributed.parallelize import parallelize
from mmcore.distributed.shards import local_rows
from mmcore.distributed.together import all_or_none, in_turn, on_first
from mmcore.errors import CheckpointError, ConfigError, DataError
from mmcore.kernels import dispatch
from mmcore.kernels.allocator import keep_pages
from mmcore.kernels.linear.cpu import multiplies_bf16
from mmcore.model import LanguageModel, build_model
from mmcore.model.accounting import training_flops_per_token
from mmcore.model.layers import drawing_rows
from mmcore.training import checks
from mmcore.training.converted import read_converted
from mmcore.training.events import Event, Listener, Notice, Preparing, Tokenizing
from mmcore.training.job import Job
from mmcore.training.memory import explain_memory
from mmcore.training.metrics import HealthLines, JsonLines, TensorBoard, keep_lines_until
from mmcore.training.profile import Profile
from mmcore.training.restoring import load_weights
from mmcore.training.run_folder import TENSORBOARD_FILES, RunFolder, check_same_recipe, disk_errors, remove
from mmcore.training.step import IGNORED
from mmcore.training.tokenizers import find_tokenizer
from mmcore.training.trainer import Trainer
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
    here = world_from_environment()
    checks.check_recipe(recipe, here, begins=not (start and start.resume))
    check_installed(recipe)
    device = checks.choose_device(recipe.training.device, here)
    precision = checks.choose_precision(recipe.training.precision, device)
    if recipe.distributed.deterministic:
        use_deterministic_algorithms(recipe.training.seed)
    world = start_world(device, recipe.distributed)
    try:
        trainer = _prepare(recipe, stage, start or Start(), list(listeners), device, precision, world)
        if profile is not None:
            folder = recipe.run_folder / "profile"
            trainer.listeners.append(Profile(folder, *profile, world, device, _teller(trainer.listeners)))
    except BaseException:
        stop_world(world)
        raise
    trainer.resources.callback(stop_world, world)
    return trainer


def _prepare(
    recipe: Recipe, stage: str, start: Start, listeners: list[Listener], device: torch.device, precision: str, world: World
) -> Trainer:
    """The trainer of this rank. Rank 0 writes the run's folder; the others wait for it where they need what it makes."""
    tell = _teller(listeners)
    run = RunFolder(recipe.run_folder)
    resumed = _find_start(recipe, precision, run, start, world, tell)
    source = _source(recipe, run, stage, world) if resumed is None else None
    first = source if resumed is None else open_checkpoint(resumed, verify=False)
    with all_or_none(world):
        checks.check_memory(recipe, device, world)
    on_first(world, lambda: checks.check_disk(recipe, start.overwrite))

    known = _known_tokenizer(recipe, first)
    tokenizer, corpus = in_turn(world, lambda: _data(recipe, known, tell))
    _agree_on_data(corpus, world)
    if device.type == "cpu":
        keep_pages()
    with explain_memory(recipe):
        tell(Preparing("building the model"))
        _remark(recipe, corpus, device, precision, tell)
        with all_or_none(world):
            model = build(recipe, device, precision, source, world)
            ends = all_ends(known_ends(first, tokenizer) if first is not None else [], tokenizer)
            job = _job(recipe, stage, model, corpus, tokenizer, ends, device, precision, world, tell)
            trainer = Trainer(job, listeners)
            if resumed is not None:
                trainer.restore(resumed)
    on_first(world, lambda: _open_run_folder(trainer, run, tokenizer, corpus, start))
    return trainer


def _teller(listeners: list[Listener]) -> Listener:
    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return tell


def _known_tokenizer(recipe: Recipe, source: Checkpoint | None) -> Path | None:
    """Where the tokenizer is that the first weights belong to, which are `source`'s; None for a fresh run, and where only
    the recipe knows.

    Raises ConfigError where weights come from elsewhere and nobody says which tokenizer is theirs.
    """
    if source is None:
        return None
    found = source.path if source.files else source.tokenizer_path
    if found is None and recipe.tokenizer.path is None:
        raise ConfigError(f"{source.path} has no tokenizer: name its own with --set tokenizer.path=")
    return found


def use_deterministic_algorithms(seed: int) -> None:
    """Let this process compute the same bits whenever it computes the same thing. To be called before CUDA starts,
    whose matrix products then work in a buffer of fixed size."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a guard against bugs, which kernels' tests have too
    torch.backends.cudnn.benchmark = False


def _data(recipe: Recipe, known: Path | None, tell: Listener) -> tuple[Tokenizer, Corpus]:
    """The tokenizer and the tokens: made, or found where another rank has made them."""
    tokenizer = find_tokenizer(recipe, known, lambda what: tell(Preparing(what)))
    corpus = prepare(recipe.data, tokenizer, progress=lambda done, total, rate: tell(Tokenizing(done, total, rate)))
    return tokenizer, corpus


def _agree_on_data(corpus: Corpus, world: World) -> None:
    """Raise DataError where a node has other tokens than the first one."""
    identity = corpus.fingerprint["identity"]
    first = on_first(world, lambda: identity)
    with all_or_none(world):
        if identity != first:
            raise DataError(
                f"rank {world.rank} sees other data than rank 0: give every node the same files, or put data.sources and "
                f"data.cache on a shared disk"
            )


def _find_start(
    recipe: Recipe, precision: str, run: RunFolder, start: Start, world: World, tell: Listener
) -> Path | None:
    """The checkpoint to resume from, or None to begin at step 1; the same on every rank, all of which look for it.

    Raises ConfigError, CheckpointError.
    """
    used = on_first(world, lambda: _look_at_folder(run, start))
    if start.overwrite or not start.resume:
        return None
    skipped: list[str] = []
    newest = next(iterate_whole(run.path, skipped.append, messages=Messages(world)), None)
    for sentence in skipped:
        tell(Notice(sentence))
    if newest is None and used:
        raise CheckpointError(f"no checkpoint of {run.path} is whole ({'; '.join(skipped)}): start over with --overwrite")
    if newest is None:
        tell(Notice(f"{run.path} holds no checkpoint yet: starting from the beginning"))
        return None
    for sentence in on_first(world, lambda: _changes(recipe, precision, newest)):
        tell(Notice(sentence))
    return newest


def _look_at_folder(run: RunFolder, start: Start) -> bool:
    """Whether the run's folder holds checkpoints. Raises ConfigError where it cannot be written, or may not."""
    run.check_writable()
    if not start.overwrite and not start.resume:
        run.refuse_if_used()
    return run.holds_checkpoints()


def _changes(recipe: Recipe, precision: str, newest: Path) -> list[str]:
    """What to say about going on from a checkpoint. Raises CheckpointError where the recipe cannot."""
    if read_converted(newest, recipe.model):
        return [f"{newest} holds weights that were converted: training begins with them at step 1"]
    try:
        before = yaml.safe_load((newest / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise CheckpointError(f"{newest} has no readable recipe.yaml: go on from it with `mm finetune` instead")
    notices = check_same_recipe(before, recipe.as_dict(), newest)
    was = read_json(newest / STATE).get("precision", precision)  # checkpoints of earlier versions do not tell
    if was != precision and not any(text.startswith("training.precision ") for text in notices):
        notices.append(f"training.precision is auto, which was {was} and is {precision} here: sums round differently")
    return notices


def _source(recipe: Recipe, run: RunFolder, stage: str, world: World) -> Checkpoint | None:
    """The checkpoint that fine-tuning starts from, the same on every rank. Raises ConfigError, CheckpointError."""
    if stage == "pretrain":
        return None
    # one rank hashes it for all, and says which it is: where a run's newest one is damaged, that is an older one
    chosen = on_first(world, lambda: _choose_source(recipe.training.init_from, run))
    with all_or_none(world):
        return open_checkpoint(chosen, verify=False)


def _choose_source(init_from: str | None, run: RunFolder) -> str:
    if init_from is None:
        raise ConfigError("the recipe has no training.init_from: name the checkpoint to go on from")
    source = open_checkpoint(init_from)
    if source.path.resolve().is_relative_to(run.path.resolve()):
        raise ConfigError(
            f"training.init_from {init_from} lies in the run's own folder {run.path}: choose another checkpoint.folder, "
            f"or another name"
        )
    return str(source.path)


def build(
    recipe: Recipe, device: torch.device, precision: str, source: Checkpoint | None = None, world: World | None = None
) -> LanguageModel:
    """The model with its first weights, drawn from the seed or the source's, spread over the ranks of `world`.

    Over several ranks no one ever holds the whole of it: it is built without memory, cut, and each rank fills its rows.
    """
    world, several = world or World(), world is not None and world.size > 1
    with torch.device("meta" if several else device):
        model = build_model(recipe.model)
    if precision == "fp8":
        model = use_float8(model)
    parallelize(model, recipe.distributed, recipe.training.compile, world, precision)
    if several:
        model.to_empty(device="cpu" if recipe.distributed.cpu_offload else device)
    if source is None:
        with drawing_rows(local_rows):
            model.init_weights(recipe.training.seed)
    else:
        load_weights(model, source.tensors, source.path)
    return model


def _job(
    recipe: Recipe,
    stage: str,
    model: LanguageModel,
    corpus: Corpus,
    tokenizer: Tokenizer,
    ends: list[int],
    device: torch.device,
    precision: str,
    world: World,
    tell: Listener,
) -> Job:
    length = recipe.training.sequence_length
    samples = Samples(corpus.train, length, recipe.data.seed)
    _tell_cut(samples, "conversations", tell)
    validation = _validation_batches(recipe, corpus, world.size, tell)
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
        config_json=config_json(recipe.model, torch.float32, tokenizer.bos_id, one_or_more(ends)),
        files=tokenizer.files(),
        data_identity=samples.identity,
        training_tokens=corpus.train.tokens,
        stage=stage,
    )


def _remark(recipe: Recipe, corpus: Corpus, device: torch.device, precision: str, tell: Listener) -> None:
    """Say what is allowed but may not be meant."""
    if device.type == "cpu" and (notice := dispatch.notice()):
        tell(Notice(notice))
    training = recipe.training
    if training.warmup_steps > training.total_steps:
        share = training.total_steps / training.warmup_steps
        tell(Notice(
            f"the warm-up of {training.warmup_steps:,} steps is longer than the run of {training.total_steps:,}: the "
            f"learning rate comes to {share:.1%} of its peak; lower training.warmup_steps"
        ))  # fmt: skip
    if precision == "bf16" and device.type == "cpu" and dispatch.excluded("cpu") is None and not multiplies_bf16():
        tell(Notice("training.precision is bf16, which this CPU computes slower than fp32, up to 130 times"))
    for path, found in corpus.fingerprint["files"].items():
        if found["skipped"] and path != PYTHON_LIBRARY:
            tell(Notice(left_out(path, found["skipped"])))


def _tell_cut(samples: Samples, what: str, tell: Listener) -> None:
    if samples.cut:
        lost = f", and {samples.lost} of them altogether, for they keep no word to learn" if samples.lost else ""
        tell(Notice(f"{samples.cut} {what} are longer than {samples.sequence_length} tokens: their ends are left out{lost}"))


def _validation_batches(recipe: Recipe, corpus: Corpus, ranks: int, tell: Listener) -> Sequence:
    """Windows spread over the held-out text, the same at every validation of every run on this data."""
    training = recipe.training
    if corpus.validation is None:
        tell(Notice("no text is held out, so this run has no validation loss: see data.validation_fraction"))
        return ()
    count = max(1, int(training.validation_tokens // training.sequence_length))
    samples = Samples(corpus.validation, training.sequence_length, shuffle=False, limit=count)
    size = min(training.micro_batch_size or training.batch_size, training.batch_size // ranks)
    starts = range(0, len(samples), size)
    if not starts:
        tell(Notice(
            f"this run has no validation loss: none of the held-out conversations has a word of the assistant within its "
            f"first {training.sequence_length} tokens"
        ))  # fmt: skip
        return ()
    _tell_cut(samples, "held-out conversations", tell)
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
        if trainer.step == 0:
            remove(run.tensorboard, TENSORBOARD_FILES)
    for path in (run.metrics, run.health):
        keep_lines_until(path, trainer.step)
    every = trainer.recipe.training.log_every
    writers = [JsonLines(run.metrics, every), HealthLines(run.health), TensorBoard(run.tensorboard, every, trainer.step)]
    if trainer.recipe.training.wandb is not None:
        writers.append(WandB(trainer.recipe, every))
    trainer.listeners = [*writers, *trainer.listeners]

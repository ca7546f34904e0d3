"""The sections of a recipe beside the model's, and the recipe. What a key means stands under each."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcore.config.model import ModelConfig
from mmcore.config.words import expanded
from mmcore.errors import ConfigError


def _expand(section: Any, key: str) -> None:
    """Make a section's path whole (`expanded`). Raises ConfigError, naming the key."""
    name = key.rpartition(".")[2]
    path = getattr(section, name)
    if path is None:
        return
    try:
        object.__setattr__(section, name, expanded(path))
    except ConfigError as error:
        raise ConfigError(f"{key} is {error}") from None


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer. Give `path`, or leave it out and one is trained on the recipe's training documents."""

    path: str | None = None
    """A sentencepiece .model, a Hugging Face tokenizer.json, a tiktoken-style file, or a folder with one."""
    train_vocab_size: int | None = None
    """Size of the sentencepiece vocabulary to train, where one is; none means model.vocab_size."""
    train_megabytes: float = 20.0
    """At most so much text is read to train it."""

    def __post_init__(self) -> None:
        _expand(self, "tokenizer.path")


@dataclass(frozen=True)
class SourceConfig:
    """One place documents come from."""

    path: str
    """A file or folder (.txt .md .py .rst .jsonl .jsonl.gz .jsonl.zst .parquet), `python-library` for the
    sources, docstrings and help topics of the running Python, or `hf:NAME[:SPLIT]` with the datasets extra."""
    weight: float | None = None
    """Share of the training samples drawn here; give it for all sources or for none (then by size)."""
    text_key: str = "text"
    """The field that holds the text in jsonl and parquet; of conversations it is always `messages`."""
    separator: str | None = "<|endoftext|>"
    """What divides a .txt file into documents; none, or absent from the file: the file is one document."""


@dataclass(frozen=True)
class DataConfig:
    """The text."""

    sources: tuple[SourceConfig, ...] = ()
    """Training documents."""
    validation: tuple[SourceConfig, ...] = ()
    """Held-out documents; none: a fraction of the training documents is held out instead."""
    validation_fraction: float = 0.01
    """The share of documents held out, chosen by a hash of their content, where `validation` is empty."""
    kind: str = "text"
    """text, or conversations: jsonl rows with `messages`, and `system` beside them where a row has one, loss on the
    assistant's words only, and not on those of a message with "weight": 0."""
    cache: str | None = None
    """Folder for tokenized shards; none: $MM_CACHE/data or ~/.cache/mm/data."""
    workers: int | None = None
    """Processes that tokenize; none: one for each core."""
    seed: int = 0
    """Orders the samples."""

    def __post_init__(self) -> None:
        if self.kind not in ("text", "conversations"):
            raise ConfigError(f"data.kind is {self.kind!r}: choose text or conversations")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"data.validation_fraction is {self.validation_fraction}: it must lie in [0, 1)")
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ConfigError("data.sources: give a weight to every source or to none")
        if any(source.weight is not None and source.weight <= 0 for source in self.sources):
            raise ConfigError("data.sources: every weight must be positive")
        _expand(self, "data.cache")


@dataclass(frozen=True)
class SpikeConfig:
    """When a loss is a spike: then the run goes back to its newest checkpoint and leaves out the samples since."""

    nats: float | None = None
    """Above the smoothed loss by more than this; give this or deviations."""
    deviations: float | None = None
    """Above the smoothed loss by more than this many standard deviations of the latest losses."""
    after_steps: int = 100
    """The first steps, whose loss still falls fast, are never taken for a spike."""
    max_rollbacks: int = 5
    """The run stops at the next spike after this many, and says so."""

    def __post_init__(self) -> None:
        if (self.nats is None) == (self.deviations is None):
            raise ConfigError("training.spike_rollback: give nats or deviations, and one of them only")
        if (self.nats or self.deviations or 0) <= 0:
            raise ConfigError("training.spike_rollback: nats or deviations must be positive")
        if self.after_steps < 1 or self.max_rollbacks < 1:
            raise ConfigError("training.spike_rollback: after_steps and max_rollbacks must be at least 1")


@dataclass(frozen=True)
class TrainingConfig:
    """The optimization (SPEC 2: AdamW, warm-up, cosine)."""

    init_from: str | None = None
    """`mm finetune` goes on from this checkpoint: a run folder, a training checkpoint or an exported folder."""
    sequence_length: int = 4096
    """Tokens of context in a training sequence."""
    batch_size: int = 1024
    """Sequences in one optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: int | None = None
    """Sequences in one forward pass of one rank; none: the whole batch of the rank."""
    steps: int | None = None
    """Optimizer steps; give this or tokens."""
    tokens: float | None = None
    """Tokens to train on, e.g. 2.0e11; rounded up to whole steps."""
    learning_rate: float = 3e-4
    """Peak."""
    final_learning_rate_ratio: float = 0.01
    """The cosine ends at this share of the peak."""
    warmup_steps: int = 2000
    """Linear warm-up from 0."""
    schedule: str = "cosine"
    """cosine, or constant after the warm-up."""
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only."""
    gradient_clip: float = 1.0
    """Largest global norm of the gradient."""
    precision: str = "auto"
    """fp32; bf16: products in bf16 over fp32 master weights, gradients summed in fp32; fp8: bf16 with the blocks' large
    products in 8-bit floats (an H100 or newer, and the extra `float8`); auto: bf16 on a GPU and on a CPU that multiplies
    it faster (a step with AMX: 2.2 to 2.9 times as fast as in fp32; with AMD's AVX512-BF16: 1.5 times), fp32 on others,
    which are up to 130 times slower in bf16."""
    device: str = "auto"
    """auto, cpu, or cuda."""
    seed: int = 0
    """Draws the weights and the long-term delays."""
    validation_every: int = 250
    """Steps between validations; 0: only at the end."""
    validation_tokens: float = 1e6
    """Tokens of held-out text read in a validation, at most."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    compile: bool = False
    """torch.compile each block."""
    on_nonfinite: str = "stop"
    """What a loss or gradient that is NaN or infinite does: stop (before the update), or skip (the step's samples are
    passed over without an update, on every rank)."""
    max_skipped_steps: int = 10
    """With skip: the run stops at so many skipped steps in a row."""
    spike_rollback: SpikeConfig | None = None
    """When and how to go back after a spike of the loss; none: never."""
    health_every: int = 500
    """Steps between measurements of the memories (health.jsonl, TensorBoard's histograms); 0: none."""
    wandb: str | None = None
    """Weights & Biases project that gets the metrics too; it needs the extra: pip install 'mm[wandb]'."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("sequence_length", "batch_size", "log_every", "max_skipped_steps"):
            if getattr(self, name) < 1:
                problems.append(f"training.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("health_every", "warmup_steps", "weight_decay", "adam_eps"):
            if getattr(self, name) < 0:
                problems.append(f"training.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("tokens", "validation_tokens", "weight_decay", "adam_eps"):
            if getattr(self, name) == math.inf:
                problems.append(f"training.{name} is infinite: it must be a number")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"training.{name} is {getattr(self, name)}: it must lie in [0, 1)")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            problems.append(f"training.micro_batch_size is {self.micro_batch_size}: it must be at least 1")
        if self.steps is not None and self.tokens is not None:
            problems.append("training.steps and training.tokens are both given: keep one")
        if (self.steps is not None and self.steps < 1) or (self.tokens is not None and self.tokens < 1):
            problems.append("training.steps or training.tokens is below 1: it must be positive")
        if not 0 < self.learning_rate < math.inf:
            problems.append(f"training.learning_rate is {self.learning_rate}: it must be positive")
        if self.schedule not in ("cosine", "constant"):
            problems.append(f"training.schedule is {self.schedule!r}: choose cosine or constant")
        if self.on_nonfinite not in ("stop", "skip"):
            problems.append(f"training.on_nonfinite is {self.on_nonfinite!r}: choose stop or skip")
        if self.precision not in ("auto", "fp32", "bf16", "fp8"):
            problems.append(f"training.precision is {self.precision!r}: choose auto, fp32, bf16 or fp8")
        if self.gradient_clip <= 0:
            problems.append(f"training.gradient_clip is {self.gradient_clip}: it must be positive")
        if problems:
            raise ConfigError("; ".join(problems))
        _expand(self, "training.init_from")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run. Raises ConfigError where the recipe gives neither steps nor tokens."""
        if self.steps is not None:
            return self.steps
        if self.tokens is None:
            raise ConfigError("the recipe says neither training.steps nor training.tokens: add one")
        return -int(-self.tokens // self.tokens_per_step)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    folder: str | None = None
    """The run's folder; none: runs/<name of the recipe>."""
    every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Older checkpoints are removed once a newer one is whole; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of the steps that this divides stay for ever, whatever keep_last says; a multiple of every, or 0
    for none."""
    asynchronous: bool = True
    """Go on training while a checkpoint is written: each rank first copies its rows of weights and moments to the
    host's memory (12 bytes a parameter, over all ranks), and only that copy takes time. Off, training stands still
    until the checkpoint is on the disk."""
    final: str = "full"
    """What the last step's checkpoint holds: full, or model, which leaves the optimizer's moments out: a third of the
    size, for reading and fine-tuning; a longer run cannot go on from it."""

    def __post_init__(self) -> None:
        problems = []
        if self.every < 1 or self.keep_last < 0 or self.keep_every < 0:
            problems.append(
                "checkpoint.every must be at least 1, checkpoint.keep_last and checkpoint.keep_every at least 0"
            )
        elif self.keep_every % self.every:
            problems.append(
                f"checkpoint.keep_every {self.keep_every} is no multiple of checkpoint.every {self.every}, so most of "
                f"those steps have no checkpoint: make it one"
            )
        if self.final not in ("full", "model"):
            problems.append(f"checkpoint.final is {self.final!r}: choose full or model")
        if problems:
            raise ConfigError("; ".join(problems))
        _expand(self, "checkpoint.folder")


@dataclass(frozen=True)
class DistributedConfig:
    """How one step is spread over ranks (processes, one for each GPU), and what is done to save memory."""

    sharding: str = "full"
    """full: weights, gradients and optimizer are cut over all ranks. hybrid: cut over the ranks of a node and copied
    on every node, which needs more memory and spares the network between nodes. A single process cuts nothing."""
    shard_size: int | None = None
    """hybrid only: the ranks that share one copy of the weights; none: those of a node."""
    gradient_reduction: str = "step"
    """When gradients are summed over ranks. step: once, after the last micro-batch; until then every rank holds the
    whole gradient in fp32 (4 bytes a parameter). micro_batch: after each, so that a rank holds its share alone; the
    sum over the copies of hybrid sharding still waits for the last. Equal where a step is one micro-batch."""
    activation_checkpointing: str = "none"
    """none; selective: norms, look-ahead values and SwiGLU's product are computed again in the backward pass, matrix
    products and memory reads are kept; full: only each block's input is kept and all the rest is computed again."""
    cpu_offload: bool = False
    """Keep each rank's share of weights, gradients and optimizer in host memory, and update it there: slow, for models
    that do not fit otherwise. Needs several ranks."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time, where a GPU has faster ones that do not."""
    timeout_seconds: float = 600.0
    """How long a rank waits for another before the job fails; preparing data and saving may take longer."""

    def __post_init__(self) -> None:
        problems = []
        for key, choices in (
            ("sharding", ("full", "hybrid")),
            ("gradient_reduction", ("step", "micro_batch")),
            ("activation_checkpointing", ("none", "selective", "full")),
        ):
            if getattr(self, key) not in choices:
                *most, last = choices
                problems.append(f"distributed.{key} is {getattr(self, key)!r}: choose {', '.join(most)} or {last}")
        if self.shard_size is not None and self.sharding != "hybrid":
            problems.append("distributed.shard_size is for hybrid sharding: set distributed.sharding=hybrid or leave it out")
        if self.shard_size is not None and self.shard_size < 1:
            problems.append(f"distributed.shard_size is {self.shard_size}: it must be at least 1")
        if self.timeout_seconds <= 0:
            problems.append(f"distributed.timeout_seconds is {self.timeout_seconds:g}: it must be positive")
        if problems:
            raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class Recipe:
    """Everything `mm pretrain` and `mm finetune` need to know."""

    name: str = "run"
    """Names the run's folder; by default the recipe file's name."""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def run_folder(self) -> Path:
        """checkpoint.folder, or one of the recipe's name. Raises ConfigError where no folder can be called so."""
        return Path(expanded(self.checkpoint.folder or Path("runs") / self.name))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON, every default spelled out."""
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

"""A recipe as typed, frozen settings.

Defaults < the recipe's `extends` parents < the recipe < `--set section.key=value`. Unknown keys and values of
the wrong type are errors that name the key, the value and the remedy; all of them are reported at once. What
a section means is written under each of its fields. No torch here: `mm --help` and `--plan` stay light.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmcore.errors import ConfigError

ARCHITECTURES = ("memory_mosaics_v2", "llama", "long_short_transformer", "memory_mosaics_v1")


@dataclass(frozen=True)
class V1Config:
    """What only a first Memory Mosaic has (Zhang et al., "Memory Mosaics", arXiv 2405.06394): the settings in which the
    public checkpoints differ."""

    variant: str = "nano"
    """nano or library, after the public code's two forms. They limit bandwidths differently, and only library divides
    logits by sqrt(d)."""
    bias: bool = False
    """Whether projections and norms add a bias."""
    norm_first: bool = True
    """Whether a memory reads x + f(norm(x)), or norm(x) + f(norm(x))."""
    persistent_banks: int = 1
    """Sets of trained pairs in each persistent memory, whose reads are averaged; 0: there is no persistent memory."""
    key_taps: int = 1
    """Tokens, the newest included, that a raw key is computed from."""
    value_taps: int | None = None
    """Tokens that a value is computed from, the newest being the one that completes the pair; none: the mix of the
    pair's own token and that one."""
    value_shift: int = 1
    """Tokens that a value looks ahead, and so the delay of the newest pair that a query reads."""

    def __post_init__(self) -> None:
        problems = []
        if self.variant not in ("nano", "library"):
            problems.append(f"model.v1.variant is {self.variant!r}: choose nano or library")
        for name, least in (("persistent_banks", 0), ("key_taps", 1), ("value_shift", 0)):
            if getattr(self, name) < least:
                problems.append(f"model.v1.{name} is {getattr(self, name)}: it must be at least {least}")
        if self.value_taps is not None and self.value_taps < 1:
            problems.append(f"model.v1.value_taps is {self.value_taps}: it must be at least 1")
        if problems:
            raise ConfigError("; ".join(problems))


@dataclass(frozen=True)
class ModelConfig:
    """The network. The keys are config.json's, so a recipe and an exported checkpoint read alike."""

    model_type: str = "memory_mosaics_v2"
    """memory_mosaics_v2, llama (the baseline), long_short_transformer (the ablation of figure 5), or memory_mosaics_v1
    (the predecessor)."""
    vocab_size: int = 128_256
    """Rows of the embedding; the tokenizer must not know more tokens."""
    hidden_size: int = 768
    """d, the width of the residual stream."""
    intermediate_size: int = 2048
    """d', the width of the persistent memory (SwiGLU); of a memory_mosaics_v1 the trained pairs of each head."""
    num_hidden_layers: int = 12
    """Blocks."""
    num_attention_heads: int = 12
    """H, heads of each memory, of size d / H."""
    num_key_value_heads: int | None = None
    """llama only: heads of keys and values (GQA); none means one for each query head."""
    head_dim: int | None = None
    """llama only: size of a head; none means hidden_size / num_attention_heads."""
    short_term_window: int = 256
    """h: a query at t reads the short-term pairs t-h+1 .. t-1 of its document."""
    long_term_delay: int = 64
    """m at inference: a query at t reads the long-term pairs 1 .. t-m of its document."""
    long_term_delay_range: tuple[int, int] = (64, 256)
    """In training m is drawn uniformly from these integers, both ends included, once a step."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm; by a memory_mosaics_v1 to the variance in LayerNorm."""
    rope_theta: float = 10_000.0
    """llama only: base of the rotary position encoding."""
    rope_scaling: dict[str, Any] | None = None
    """llama only: config.json's rope_scaling (rope_type linear or llama3)."""
    max_position_embeddings: int = 4096
    """The context the model was trained for. Reading further is allowed, and said."""
    tie_word_embeddings: bool = False
    """Whether embedding and classifier are one matrix."""
    v1: V1Config | None = None
    """memory_mosaics_v1 only: the settings that no other model has; none means their defaults."""

    def __post_init__(self) -> None:
        problems = []
        if self.model_type == "memory_mosaics_v1":
            object.__setattr__(self, "v1", self.v1 or V1Config())
        elif self.v1 is not None:
            problems.append(f"model.v1 is given for a {self.model_type}: remove it, or choose memory_mosaics_v1")
        if self.model_type not in ARCHITECTURES:
            problems.append(f"model.model_type is {self.model_type!r}: choose one of {', '.join(ARCHITECTURES)}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "short_term_window", "long_term_delay", "max_position_embeddings"):
            if getattr(self, name) < 1:
                problems.append(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        if not problems:
            problems = self._misfits()
        if problems:
            raise ConfigError("; ".join(problems))

    def _misfits(self) -> list[str]:
        problems = []
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            problems.append(
                f"model.hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads: "
                f"make it a multiple of model.num_attention_heads"
            )
        if self.num_attention_heads % self.kv_heads:
            problems.append(
                f"model.num_key_value_heads {self.kv_heads} does not divide model.num_attention_heads "
                f"{self.num_attention_heads}"
            )
        low, high = self.long_term_delay_range
        if not 1 <= low <= high:
            problems.append(f"model.long_term_delay_range is [{low}, {high}]: it must be [low, high], 1 <= low <= high")
        if self.rms_norm_eps <= 0:
            problems.append(f"model.rms_norm_eps is {self.rms_norm_eps}: it must be positive")
        return problems

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer. Give `path`, or leave it out and one is trained on the recipe's training documents."""

    path: str | None = None
    """A sentencepiece .model, a Hugging Face tokenizer.json, a tiktoken-style file, or a folder with one."""
    train_vocab_size: int | None = None
    """Size of the sentencepiece vocabulary to train; none means model.vocab_size."""
    train_megabytes: float = 20.0
    """At most so much text is read to train it."""


@dataclass(frozen=True)
class SourceConfig:
    """One place documents come from."""

    path: str
    """A file or folder (.txt .md .py .rst .jsonl .jsonl.gz .jsonl.zst .parquet), `python-library` for the
    sources, docstrings and help topics of the running Python, or `hf:NAME[:SPLIT]` with the datasets extra."""
    weight: float | None = None
    """Share of the training samples drawn here; give it for all sources or for none (then by size)."""
    text_key: str = "text"
    """The field that holds the text in jsonl and parquet."""
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
    """text, or conversations: jsonl rows with `messages`, loss on the assistant's words only."""
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
    products in 8-bit floats (an H100 or newer, and the extra `float8`); auto: bf16 on a GPU, fp32 on a CPU, where bf16
    matrix products are 8 to 130 times slower."""
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
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            problems.append(f"training.micro_batch_size is {self.micro_batch_size}: it must be at least 1")
        if self.steps is not None and self.tokens is not None:
            problems.append("training.steps and training.tokens are both given: keep one")
        if (self.steps is not None and self.steps < 1) or (self.tokens is not None and self.tokens < 1):
            problems.append("training.steps or training.tokens is below 1: it must be positive")
        if self.learning_rate <= 0:
            problems.append(f"training.learning_rate is {self.learning_rate}: it must be positive")
        if self.schedule not in ("cosine", "constant"):
            problems.append(f"training.schedule is {self.schedule!r}: choose cosine or constant")
        if self.on_nonfinite not in ("stop", "skip"):
            problems.append(f"training.on_nonfinite is {self.on_nonfinite!r}: choose stop or skip")
        if self.health_every < 0:
            problems.append(f"training.health_every is {self.health_every}: it must not be negative")
        if self.precision not in ("auto", "fp32", "bf16", "fp8"):
            problems.append(f"training.precision is {self.precision!r}: choose auto, fp32, bf16 or fp8")
        if not 0 <= self.warmup_steps:
            problems.append(f"training.warmup_steps is {self.warmup_steps}: it must not be negative")
        if self.gradient_clip <= 0:
            problems.append(f"training.gradient_clip is {self.gradient_clip}: it must be positive")
        if problems:
            raise ConfigError("; ".join(problems))

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
        return Path(self.checkpoint.folder or Path("runs") / self.name)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON, every default spelled out."""
        return _plain(dataclasses.asdict(self))


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Relative paths in data.sources, data.validation, tokenizer.path and training.init_from are taken from the
    folder the command runs in, as in a shell. Raises ConfigError, naming every fault found.
    """
    return build_recipe(read_recipe(path, overrides), origin=str(path))


def read_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The values that a recipe file, those it extends, and the overrides give, without the defaults.

    Raises ConfigError where a file cannot be read; keys and types are checked by `build_recipe`.
    """
    path = Path(path)
    values = _read_chain(path, ())
    for override in overrides:
        _apply_override(values, override)
    values.setdefault("name", path.stem)
    return values


def build_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A Recipe from nested plain values. Raises ConfigError, naming every fault found."""
    problems: list[str] = []
    recipe = _build(Recipe, values, "", problems)
    if problems:
        raise ConfigError(f"{origin}: " + "; ".join(problems))
    return recipe


def model_config_from_json(values: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from an exported config.json; keys of other libraries are ignored. Raises ConfigError."""
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    chosen = {key: value for key, value in values.items() if key in known}
    parameters = values.get("rope_parameters")  # transformers 5 moved theta and scaling in here
    if isinstance(parameters, dict):
        chosen["rope_theta"] = float(parameters.get("rope_theta", chosen.get("rope_theta") or 10_000.0))
        if parameters.get("rope_type", "default") != "default":
            chosen["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    problems: list[str] = []
    config = _build(ModelConfig, chosen, "config.json", problems)
    if problems:
        raise ConfigError("; ".join(problems))
    return config


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's values laid over those of the recipe it extends."""
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself: remove one `extends`")
    if not path.is_file():
        raise ConfigError(f"there is no recipe {path}{_near_file(path)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a YAML recipe: {first}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a recipe: it must hold sections such as model and training")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    base = _read_chain(path.parent / str(parent), (*seen, path.resolve()))
    base.pop("name", None)
    return _overlay(base, values)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 and 1e12 as numbers (YAML 1.1 wants 3.0e-4) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _near_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    return f": did you mean {path.parent / near[0]}?" if near else ": check the path"


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML") from None
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    values[last] = value


def _build(cls: type, values: Any, where: str, problems: list[str]) -> Any:
    """An instance of the dataclass `cls`; faults are appended to `problems`, and None comes back with them."""
    if not isinstance(values, dict):
        problems.append(f"{where or 'the recipe'} is {values!r}: it must be a section with keys")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    chosen = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
            problems.append(f"unknown key {name}: {advice}")
            continue
        chosen[key] = _convert(hints[key], value, name, problems)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in chosen:
            problems.append(f"{where}.{name} is missing")
    if len(problems) > before:
        return None
    try:
        return cls(**chosen)
    except ConfigError as error:
        problems.append(str(error))
        return None


def _convert(kind: Any, value: Any, name: str, problems: list[str]) -> Any:
    """`value` as `kind`, or a fault. ints pass as floats and whole floats (1e6) as ints; nothing else is bent."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kind = next(a for a in arguments if a is not type(None))
        return _convert(kind, value, name, problems)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name, problems)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            count = "a list" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
            problems.append(f"{name} is {value!r}: it must be {count}")
            return None
        return tuple(_convert(arguments[0], item, f"{name}[{i}]", problems) for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    problems.append(f"{name} is {value!r}: it must be {words.get(kind, 'a section')}")
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

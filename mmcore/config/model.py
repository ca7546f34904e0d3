"""What a model is: config.json's keys, which are those of a recipe's `model` section."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mmcore.config.rotary import rope_type, scaling_problem
from mmcore.config.typed import build
from mmcore.errors import ConfigError

ROTARY = ("llama", "long_short_transformer")
"""The architectures in which positions turn queries and keys."""
_ROTARY_ONLY = ("rope_theta", "rope_scaling")
_LLAMA_ONLY = ("num_key_value_heads", "head_dim")
_MEMORIES_ONLY = ("short_term_window", "long_term_delay", "long_term_delay_range")
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
        for name, least in (("persistent_banks", 0), ("key_taps", 1), ("value_taps", 1), ("value_shift", 0)):
            value = getattr(self, name)
            if value is not None and not least <= value < 1 << 10:
                problems.append(f"model.v1.{name} is {value}: it must be at least {least} and below 1024")
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
    adaptive_bandwidth: bool = True
    """memory_mosaics_v2 only: off, the bandwidth of a memory no longer grows with the pairs in it (alpha of equation 6 is
    0 for good): an ablation."""
    gated_keys: bool = True
    """memory_mosaics_v2 only: off, keys are averages whose gate is 1 and whose decay is one trained number a head, as in a
    first Memory Mosaic, whatever is read: an ablation of equation 8."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm; by a memory_mosaics_v1 to the variance in LayerNorm."""
    rope_theta: float = 10_000.0
    """llama and long_short_transformer only: base of the rotary position encoding."""
    rope_scaling: dict[str, Any] | None = None
    """llama and long_short_transformer only: config.json's rope_scaling (rope_type linear or llama3)."""
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
                     "num_key_value_heads", "head_dim", "short_term_window", "long_term_delay", "max_position_embeddings"):
            value = getattr(self, name)
            is_none = not value and name in _LLAMA_ONLY
            if not is_none and not 1 <= value < 1 << 31:
                problems.append(f"model.{name} is {value}: it must be at least 1 and below 2**31")
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
        for name in ("adaptive_bandwidth", "gated_keys"):
            if not getattr(self, name) and self.model_type != "memory_mosaics_v2":
                problems.append(f"model.{name} is off for a {self.model_type}: only a memory_mosaics_v2 has it, remove it")
        if not 1 <= low <= high:
            problems.append(f"model.long_term_delay_range is [{low}, {high}]: it must be [low, high], 1 <= low <= high")
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                problems.append(f"model.{name} is {getattr(self, name)}: it must be positive and finite")
        if self.is_rotary and (problem := scaling_problem(self.rope_scaling or {})):
            problems.append(f"model.{problem}")
        if self.is_rotary and self.head_size % 2:
            problems.append(f"a head of size {self.head_size} cannot be rotated: it must be even")
        if self.head_dim and self.model_type != "llama" and self.head_dim * self.num_attention_heads != self.hidden_size:
            problems.append("model.head_dim is only known to llama: remove it")
        return problems

    @property
    def is_rotary(self) -> bool:
        """Whether positions turn queries and keys, as rope_theta and rope_scaling say."""
        return self.model_type in ROTARY

    @property
    def unused(self) -> tuple[str, ...]:
        """The settings that a model of this type has no use for."""
        names = () if self.is_rotary else _ROTARY_ONLY
        return names + (_MEMORIES_ONLY if self.model_type == "llama" else _LLAMA_ONLY)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads


def model_config_from_json(values: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from an exported config.json; keys of other libraries are ignored. Raises ConfigError."""
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    chosen = {key: value for key, value in values.items() if key in known}
    parameters = values.get("rope_parameters")  # transformers 5 moved theta and scaling in here
    if isinstance(parameters, dict):
        chosen["rope_theta"] = float(parameters.get("rope_theta", chosen.get("rope_theta") or 10_000.0))
        if rope_type(parameters) != "default":
            chosen["rope_scaling"] = {key: value for key, value in parameters.items() if key != "rope_theta"}
    problems: list[str] = []
    config = build(ModelConfig, chosen, "config.json", problems)
    if problems:
        raise ConfigError("; ".join(problems))
    return config

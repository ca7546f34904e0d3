"""config.json: read with distrust, written as the contract says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mmcore.checkpoint import untrusted
from mmcore.checkpoint.tensorfile import dtype_name
from mmcore.checkpoint.untrusted import shown
from mmcore.config import ARCHITECTURES, ModelConfig, model_config_from_json
from mmcore.config.model import ROTARY
from mmcore.config.rotary import NUMBERS, rope_type, scaling_problem
from mmcore.errors import CheckpointError, ConfigError

_ARCHITECTURE_NAMES = {
    "memory_mosaics_v2": "MemoryMosaicForCausalLM",
    "llama": "LlamaForCausalLM",
    "long_short_transformer": "LongShortTransformerForCausalLM",
    "memory_mosaics_v1": "MemoryMosaicV1ForCausalLM",
}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
           "rms_norm_eps", "max_position_embeddings")  # fmt: skip
_TWO_MEMORIES = ("short_term_window", "long_term_delay", "long_term_delay_range")
_UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None,
                "partial_rotary_factor": 1.0}  # fmt: skip
"""Settings of other Llamas -> the only value this model has."""
_WEIGHT_DTYPE_NAMES = ("float64", "float32", "bfloat16", "float16")


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """config.json of a folder, as settings and as it is. Raises CheckpointError; auto_map is never followed."""
    path = folder / "config.json"
    values = untrusted.read_json(path)
    return config_from(values, str(path)), values


def config_from(values: dict[str, Any], origin: str) -> ModelConfig:
    """The settings in a config.json. Raises CheckpointError, naming all that this model cannot be."""
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{origin}: model_type is {shown(repr(kind))}, and only {', '.join(ARCHITECTURES)} can be read"
        )
    needed = _NEEDED + {"llama": (), "memory_mosaics_v1": ("v1",)}.get(kind, _TWO_MEMORIES)
    problems = [f"{key} is missing" for key in needed if values.get(key) is None]
    for key in ("dtype", "torch_dtype"):  # what the files hold is what counts, but this must be a dtype at all
        if values.get(key) not in (None, "auto", *_WEIGHT_DTYPE_NAMES):
            problems.append(f"{key} is {shown(repr(values[key]))} and must be one of {', '.join(_WEIGHT_DTYPE_NAMES)}")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if not are_token_ids(values.get(key), several=key == "eos_token_id"):
            problems.append(f"{key} is {shown(repr(values[key]))} and must be a token id")
    for key, only in _UNSUPPORTED.items():
        if values.get(key, only) not in (only, None):
            problems.append(f"{key} is {shown(repr(values[key]))} and this model only knows {only!r}")
    try:
        scaling = _rope_scaling(values) if kind in ROTARY else None
        known = {key: value for key, value in values.items() if key not in ("rope_scaling", "rope_parameters")}
        theta = (values.get("rope_parameters") or {}).get("rope_theta") if kind in ROTARY else None
        if theta is not None:
            known["rope_theta"] = theta
        config = model_config_from_json(_without_nulls(known | ({"rope_scaling": scaling} if scaling else {})))
    except (ConfigError, ValueError, OverflowError, TypeError, AttributeError) as error:
        # the last four: numbers beyond float and lists where a number or a section belongs
        problems.append(shown(str(error), 1000))
    if problems:
        raise CheckpointError(f"{origin} cannot be used: {'; '.join(problems)}")
    return config


def are_token_ids(value: Any, several: bool) -> bool:
    """Whether a value is none, or one id, or, where a text may end with `several`, a list of ids."""
    ids = value if several and isinstance(value, list) else [] if value is None else [value]
    return all(type(i) is int and -(1 << 31) <= i < 1 << 31 for i in ids)  # -1 stands for none in some folders


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face writes null for "the default"."""
    return {key: value for key, value in values.items() if value is not None}


def _rope_scaling(values: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling of rotary positions in the form `{"rope_type": ..., ...}`, whichever way it was written."""
    given = values.get("rope_parameters") or values.get("rope_scaling")
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError("rope_scaling must be a section")
    kind = rope_type(given)
    if kind == "default":
        return None
    if problem := scaling_problem(given):
        raise ValueError(problem)
    return {"rope_type": kind, **{key: given[key] for key in NUMBERS[kind]}}


def config_json(config: ModelConfig, dtype: torch.dtype, bos_token_id: int | None = None,
                eos_token_id: int | list[int] | None = None) -> dict[str, Any]:  # fmt: skip
    """config.json of an exported checkpoint whose weights all are of `dtype`."""
    values: dict[str, Any] = {
        "model_type": config.model_type,
        "architectures": [_ARCHITECTURE_NAMES[config.model_type]],
        **{key: getattr(config, key) for key in _NEEDED[:5]},
    }
    if config.model_type == "llama":
        given = {"num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim}
        values |= {key: value for key, value in given.items() if value is not None}
        values |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    elif config.v1:
        values["v1"] = dataclasses.asdict(config.v1)
    else:
        values |= {key: getattr(config, key) for key in _TWO_MEMORIES}
        values["long_term_delay_range"] = list(config.long_term_delay_range)
        values |= {key: False for key in ("adaptive_bandwidth", "gated_keys") if not getattr(config, key)}
    if config.is_rotary:
        # transformers 4 reads these two; transformers 5 turns them into its rope_parameters
        values |= {"rope_theta": config.rope_theta, "rope_scaling": config.rope_scaling}
    return values | {
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype_name(dtype),
    }


def generation_config_json(values: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json that belongs to a config.json: where a text begins and ends."""
    return {"bos_token_id": values.get("bos_token_id"), "eos_token_id": values.get("eos_token_id")}

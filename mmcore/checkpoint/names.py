"""Names and shapes of a model's tensors, and what other programs call them. No I/O.

`expected_tensors` is what a configuration implies; a checkpoint must match it exactly before anything is loaded.
Hugging Face's Llama names are the baseline's own. Meta's are one table of templates, inverted in code, plus the
rotary permutation: Meta (and llama2.c) rotates neighbours (2i, 2i+1) of a head, Hugging Face the halves
(i, i + D/2), so the rows of q and k are reordered within each head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from mmcore.checkpoint.untrusted import shown
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]

META_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{l}.input_layernorm.weight": "layers.{l}.attention_norm.weight",
    "model.layers.{l}.self_attn.q_proj.weight": "layers.{l}.attention.wq.weight",
    "model.layers.{l}.self_attn.k_proj.weight": "layers.{l}.attention.wk.weight",
    "model.layers.{l}.self_attn.v_proj.weight": "layers.{l}.attention.wv.weight",
    "model.layers.{l}.self_attn.o_proj.weight": "layers.{l}.attention.wo.weight",
    "model.layers.{l}.post_attention_layernorm.weight": "layers.{l}.ffn_norm.weight",
    "model.layers.{l}.mlp.gate_proj.weight": "layers.{l}.feed_forward.w1.weight",
    "model.layers.{l}.mlp.down_proj.weight": "layers.{l}.feed_forward.w2.weight",
    "model.layers.{l}.mlp.up_proj.weight": "layers.{l}.feed_forward.w3.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
"""Hugging Face's Llama names -> Meta's."""

EMBEDDING, CLASSIFIER = "model.embed_tokens.weight", "lm_head.weight"

_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_LISTED = 20  # names of one kind in a message; more are counted


def expected_tensors(config: ModelConfig) -> Shapes:
    """Name -> shape of every tensor of the model's exported checkpoint, in the order of the layers.

    A tied classifier (tie_word_embeddings) is the embedding itself and has no name of its own.
    """
    d, vocabulary = config.hidden_size, config.vocab_size
    layer = {"llama": _llama_layer, "memory_mosaics_v1": _v1_layer}.get(config.model_type, _two_memory_layer)(config)
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, d)}
    for l in range(config.num_hidden_layers):  # noqa: E741 - the layer index of the paper and of the names
        shapes.update({f"model.layers.{l}.{name}": shape for name, shape in layer.items()})
    shapes["model.norm.weight"] = (d,)
    if config.v1 and config.v1.bias:
        shapes["model.norm.bias"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocabulary, d)
    return shapes


def _llama_layer(config: ModelConfig) -> Shapes:
    d, wide = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    return {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (queries, d),
        "self_attn.k_proj.weight": (keys, d),
        "self_attn.v_proj.weight": (keys, d),
        "self_attn.o_proj.weight": (d, queries),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (wide, d),
        "mlp.up_proj.weight": (wide, d),
        "mlp.down_proj.weight": (d, wide),
    }


def _two_memory_layer(config: ModelConfig) -> Shapes:
    """A block with a short-term and a long-term part: the mosaic, or the transformer of figure 5."""
    d, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    if config.model_type == "memory_mosaics_v2":
        gates = {"gate_proj.weight": (heads, d), "decay_proj.weight": (heads, d)}
        memory = {"key_proj.weight": (d, d), "value_proj.weight": (d, d),
                  **(gates if config.gated_keys else {"key_decay": (heads,)}), "value_mix": (heads,),
                  "value_log_scale": (heads,), "bandwidth_base": (heads,), "bandwidth_slope": (heads,),
                  "bandwidth_exponent": (heads,)}  # fmt: skip
    else:
        memory = {"q_proj.weight": (d, d), "k_proj.weight": (d, d), "v_proj.weight": (d, d)}
    layer: Shapes = {"memory_norm.weight": (d,)}
    for part in ("short_term", "long_term"):
        layer.update({f"{part}.{name}": shape for name, shape in memory.items()})
    return layer | {
        "out_proj.weight": (d, 2 * d),
        "persistent_norm.weight": (d,),
        "persistent.gate_proj.weight": (wide, d),
        "persistent.up_proj.weight": (wide, d),
        "persistent.down_proj.weight": (d, wide),
    }


def _v1_layer(config: ModelConfig) -> Shapes:
    d, heads, v1 = config.hidden_size, config.num_attention_heads, config.v1
    slots = (v1.persistent_banks, heads, config.intermediate_size, config.head_size)

    def square(name: str, taps: int = 1) -> Shapes:
        return {f"{name}.weight": (d, d) if taps == 1 else (d, d, taps)} | ({f"{name}.bias": (d,)} if v1.bias else {})

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (d,)} | ({f"{name}.bias": (d,)} if v1.bias else {})

    def memory(name: str, values: Shapes) -> Shapes:
        scalars = ("key_decay", "bandwidth", "value_log_scale")
        parts = square("key_proj", v1.key_taps) | {scalar: (heads,) for scalar in scalars} | values | square("out_proj")
        return {f"{name}.{part}": shape for part, shape in parts.items()}

    mix = {"value_mix": (heads,)} if v1.value_taps is None else {}
    layer = norm("memory_norm") | memory("contextual", square("value_proj", v1.value_taps or 1) | mix)
    if v1.persistent_banks:
        layer |= norm("persistent_norm") | memory("persistent", {"slot_keys": slots, "slot_values": slots})
    return layer


def check_tensors(config: ModelConfig, found: Mapping[str, tuple[int, ...]], origin: object,
                  problems: Iterable[str] = ()) -> list[str]:  # fmt: skip
    """Compare found shapes with what `config` implies; returns the names to load.

    Raises one CheckpointError that lists all missing, unexpected and misshapen tensors, and further `problems`.
    Rotary tables that old Llama files carry are left out: they follow from the configuration.
    """
    faults = list(problems)
    if config.num_hidden_layers > len(found):  # before a list of the layers is made
        raise CheckpointError(
            f"{origin}: config.json says {config.num_hidden_layers} layers and the files hold {len(found)} tensors: "
            f"they do not belong together{''.join(f'; {problem}' for problem in faults)}"
        )
    expected = expected_tensors(config)
    found = {name: shape for name, shape in found.items() if name in expected or not _IGNORED.fullmatch(name)}
    faults = shape_faults(expected, found, faults)
    if faults:
        raise CheckpointError(f"{origin} does not fit its config.json: {'; '.join(faults)}")
    return list(expected)


def shape_faults(expected: Shapes, found: Mapping[str, tuple[int, ...]], problems: Iterable[str] = ()) -> list[str]:
    """All that is wrong with the found shapes, beside the `problems` known already: missing, unexpected, misshapen."""
    faults = list(problems)
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {list(found[name])} and must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    for word, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if names:
            faults.append(f"{len(names)} {word} ({_listed(names)})")
    return faults


def twin_of(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> str | None:
    """The classifier where a tied model's file holds it a second time: it is left out, and must equal the embedding."""
    twice = config.tie_word_embeddings and CLASSIFIER in found and EMBEDDING in found
    return CLASSIFIER if twice and found[CLASSIFIER] == found[EMBEDDING] else None


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(shown(name, 200) for name in names[:_LISTED]) + more


def meta_name(name: str) -> str:
    """Meta's name of a tensor that Hugging Face's Llama calls `name`. Raises KeyError."""
    return _translate(name, META_NAMES)


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor that Meta's Llama calls `name`. Raises KeyError."""
    return _translate(name, {theirs: ours for ours, theirs in META_NAMES.items()})


def _translate(name: str, table: Mapping[str, str]) -> str:
    layer = re.search(r"layers\.(\d+)\.", name)
    template = name if layer is None else f"{name[: layer.start(1)]}{{l}}{name[layer.end(1) :]}"
    return table[template].replace("{l}", layer[1]) if layer else table[template]


def meta_to_hugging_face(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A tensor of Meta's layout in Hugging Face's; `name` is Hugging Face's. Only q and k change."""
    heads = _rotated_heads(name, config)
    return tensor if heads is None else _swap(tensor, heads, (-1, 2))


def hugging_face_to_meta(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The inverse of meta_to_hugging_face."""
    heads = _rotated_heads(name, config)
    return tensor if heads is None else _swap(tensor, heads, (2, -1))


def _rotated_heads(name: str, config: ModelConfig) -> int | None:
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_attention_heads
    return config.kv_heads if name.endswith("self_attn.k_proj.weight") else None


def _swap(weight: Tensor, heads: int, split: tuple[int, int]) -> Tensor:
    rows, columns = weight.shape
    return weight.reshape(heads, *split, columns).transpose(1, 2).reshape(rows, columns)

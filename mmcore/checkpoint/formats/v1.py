"""The public v1 code's checkpoints (facebookresearch/MemoryMosaics): ckpt.pt of nanoMosaics and of Library.

A file holds `model`, a state dict whose names torch.compile may have prefixed; `model_args`, the settings; and an
optimizer, which is left out. nanoMosaics also keeps its masks as buffers, which follow from the settings and are
compared with what they must be. Library has two forms of the same equations: the plain one, and `eft`, whose CUDA kernel
computes the leaky average, under other names. A tied classifier is stored twice, and so is eft's decay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.checkpoint import tensorfile
from mmcore.checkpoint.formats import torchfile
from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.names import Shapes, expected_tensors, shape_faults
from mmcore.checkpoint.tensorfile import WEIGHT_DTYPES, LazyTensors, TensorSpec
from mmcore.checkpoint.untrusted import shown
from mmcore.config import ModelConfig, V1Config
from mmcore.errors import CheckpointError, ConfigError

GPT2_SIZES = (50257, 50304)
"""GPT-2's vocabulary, and the multiple of 64 that the public code rounds it up to."""
GPT2_END = 50256
_PREFIXES = re.compile(r"(_orig_mod\.|module\.)+")
_NUMBERS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "pmem_count", "pmem_size")
_LARGEST = 1 << 31

_BLOCK = {
    "nano": {
        "memory_norm.*": "ln_1.*",
        "contextual.key_proj.*": "attn.k_featurizer.W_k.*",
        "contextual.key_decay": "attn.k_featurizer.leaky_avg.leaky_key_beta",
        "contextual.bandwidth": "attn.k_featurizer.key_scale",
        "contextual.value_proj.*": "attn.v_featurizer.W_v.*",
        "contextual.value_mix": "attn.v_featurizer.coef",
        "contextual.value_log_scale": "attn.v_featurizer.val_scale",
        "contextual.out_proj.*": "attn.c_proj.*",
        "persistent_norm.*": "ln_2.*",
        "persistent.key_proj.*": "mlp.k_featurizer.W_k.*",
        "persistent.key_decay": "mlp.k_featurizer.leaky_avg.leaky_key_beta",
        "persistent.bandwidth": "mlp.k_featurizer.key_scale",
        "persistent.value_log_scale": "mlp.out_scale",
        "persistent.slot_keys": "mlp.P_k",
        "persistent.slot_values": "mlp.P_v",
        "persistent.out_proj.*": "mlp.c_proj.*",
    },
    "library": {
        "memory_norm.*": "ln1.*",
        "contextual.key_proj.*": "attn.{keys}.*",
        "contextual.key_decay": "attn.{decay}",
        "contextual.bandwidth": "attn.kernel_beta",
        "contextual.value_proj.*": "attn.{values}.*",
        "contextual.value_mix": "attn.v_featurizer.coef",
        "contextual.value_log_scale": "attn.value_beta",
        "contextual.out_proj.*": "attn.c_proj.*",
        "persistent_norm.*": "ln2.*",
        "persistent.key_proj.*": "pmem.{keys}.*",
        "persistent.key_decay": "pmem.{decay}",
        "persistent.bandwidth": "pmem.kernel_beta",
        "persistent.value_log_scale": "pmem.value_beta",
        "persistent.slot_keys": "pmem.pmem.M_k{bank}",
        "persistent.slot_values": "pmem.pmem.M_v{bank}",
        "persistent.out_proj.*": "pmem.c_proj.*",
    },
}
"""Our names within a block -> theirs; `*` is weight or bias."""
_ENDS = {
    "nano": {"model.embed_tokens.*": "mosaic.wte.*", "model.norm.*": "mosaic.ln_f.*", "lm_head.*": "lm_head.*"},
    "library": {"model.embed_tokens.*": "emb.*", "model.norm.*": "ln_out.*", "lm_head.*": "head.*"},
}
_ROOTS = {"nano": "mosaic.h.", "library": "blocks."}


@dataclass(frozen=True)
class _Layout:
    """How a file names and shapes the tensors of a model."""

    config: ModelConfig
    words: dict[str, str]
    """What stands for {keys}, {values} and {decay} in Library's names."""
    conv_keys: bool
    conv_values: bool
    fast: bool
    """eft: the decay appears twice."""
    idle_key_mix: bool
    """A key featurizer of type lowrlinearconv has a mix of a token with itself, which changes nothing."""


def is_v1(path: Path) -> bool:
    """Whether a .pt of PyTorch's is of the public v1 code: it has model_args, or at least the names of one of its models.
    Raises CheckpointError."""
    held = torchfile.plain_dict(torchfile.read_torch_file(path)) or {}
    names = torchfile.plain_dict(held.get("model")) or held
    typical = ("mosaic.wte.weight", "blocks.0.attn.kernel_beta")
    return "model_args" in held or any(isinstance(name, str) and name.endswith(typical) for name in names)


def open_v1(path: Path, *, verify: bool = True, allow_nonfinite: bool = False) -> Checkpoint:
    """A public v1 checkpoint, its names and shapes compared with its settings; weights are read when asked for.

    verify: also compare the file's own checksums. Raises CheckpointError.
    """
    held = torchfile.plain_dict(torchfile.read_torch_file(path, checksums=verify)) or {}
    state, args = torchfile.plain_dict(held.get("model")), torchfile.plain_dict(held.get("model_args"))
    if state is None or args is None:
        raise CheckpointError(
            f"{path} holds no `model` with its `model_args`: give a ckpt.pt that the public v1 code's train script wrote"
        )
    tensors = _unprefixed(state, path)
    layout = _layout(args, tensors, path)
    sources = _sources(layout)
    _check(layout, sources, tensors, path)
    shapes = expected_tensors(layout.config)
    dtypes = {name: tensors[sources[name][0]].dtype for name in shapes}
    readers = {name: partial(_read, tensors, sources[name], shapes[name], path) for name in shapes}
    widest = max(dtypes.values(), key=lambda dtype: -WEIGHT_DTYPES.index(dtype))
    end = GPT2_END if layout.config.vocab_size in GPT2_SIZES else None
    return Checkpoint(
        format="v1",
        path=path,
        config=layout.config,
        config_json=config_json(layout.config, widest, end, end),
        tensors=LazyTensors(
            readers, {name: TensorSpec(dtypes[name], shapes[name]) for name in shapes}, path, allow_nonfinite
        ),
        weight_files=(path,),
        tokenizer_path=_find_tokenizer(path.parent),
        dtype=widest,
    )


def _unprefixed(state: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors by the names that they have without torch.compile. Raises CheckpointError."""
    found: dict[str, Tensor] = {}
    size = path.stat().st_size
    faults = []
    for key, value in state.items():
        name = _PREFIXES.sub("", key, count=1) if isinstance(key, str) and _PREFIXES.match(key) else key
        if not isinstance(name, str) or type(value) not in (Tensor, torch.nn.Parameter):
            faults.append(f"{shown(str(key))} is no tensor")
        elif name in found:
            faults.append(f"{shown(name)} is there twice")
        elif problem := torchfile.tensor_problem(value, size):
            faults.append(f"{shown(name)} {problem}")
        else:
            found[name] = value.detach()
    if faults:
        more = f", and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise CheckpointError(f"{path} holds no state dict of a model: {', '.join(faults[:20])}{more}")
    return found


def _layout(args: dict[Any, Any], tensors: Mapping[str, Tensor], path: Path) -> _Layout:
    """The settings in model_args, and the form of the code that wrote them. Raises CheckpointError."""
    nano = "mosaic.wte.weight" in tensors
    if not nano and "emb.weight" not in tensors:
        other = "a GPT-2 of nanoMosaics" if "transformer.wte.weight" in tensors else "none of the public v1 models"
        raise CheckpointError(f"{path} is {other}: give a Memory Mosaic of nanoMosaics or Library")
    fast = any(".leaky_average." in name for name in tensors)
    settings = _Settings(args)
    numbers = {name: settings.number(name, 0 if name.startswith("pmem_") else 1) for name in _NUMBERS}
    if nano:
        v1 = {"bias": settings.flag("bias"), "persistent_banks": numbers["pmem_count"]}
        conv_keys = conv_values = lowrank_keys = False
        tied = True
    else:
        taps, kinds = {}, {}
        for part in ("k", "v"):
            kinds[part] = settings.choice(f"{part}_fe_type", ("linearconv", "lowrlinearconv"))
            taps[part] = settings.number(f"{part}_kernel_size", 1)
            if kinds[part] == "lowrlinearconv" and taps[part] != 2:
                settings.problems.append(f"{part}_kernel_size must be 2 with lowrlinearconv")
        conv_keys, conv_values = kinds["k"] == "linearconv" and not fast, kinds["v"] == "linearconv"
        lowrank_keys = kinds["k"] == "lowrlinearconv" and not fast
        tied = settings.flag("weight_tying")
        v1 = dict(
            variant="library", bias=settings.flag("bias"), norm_first=settings.flag("pre_ln"),
            persistent_banks=0 if settings.flag("attn_only") else numbers["pmem_count"],
            key_taps=taps["k"] if conv_keys else 1, value_taps=taps["v"] if conv_values else None,
            value_shift=settings.number("v_shift", 0),
        )  # fmt: skip
    if numbers["pmem_count"] == 0 and not settings.given("attn_only"):
        settings.problems.append("pmem_count is 0")
    settings.finish(path)
    try:
        config = ModelConfig(
            model_type="memory_mosaics_v1", vocab_size=numbers["vocab_size"], hidden_size=numbers["n_embd"],
            intermediate_size=max(1, numbers["pmem_size"]), num_hidden_layers=numbers["n_layer"],
            num_attention_heads=numbers["n_head"], max_position_embeddings=numbers["block_size"],
            rms_norm_eps=1e-5, tie_word_embeddings=tied, v1=V1Config(**v1),
        )  # fmt: skip
    except ConfigError as error:
        raise CheckpointError(f"the model_args of {path} cannot be used: {error}") from error
    if numbers["n_layer"] > len(tensors):
        told = f"n_layer is {numbers['n_layer']} and it holds {len(tensors)} tensors"
        raise CheckpointError(f"the model_args of {path} cannot be used: {told}")
    keys = "leaky_average.linear" if fast else f"k_featurizer.{'conv' if conv_keys else 'linear'}"
    words = {
        "keys": keys,
        "values": f"v_featurizer.{'conv' if conv_values else 'linear'}",
        "decay": "leaky_average.leaky_beta_w_under" if fast else "leaky_key_beta",
    }
    return _Layout(config, words, conv_keys, conv_values, fast, lowrank_keys)


class _Settings:
    """model_args, read one by one; what is wrong is collected."""

    def __init__(self, args: dict[Any, Any]) -> None:
        self.args = args
        self.problems: list[str] = []

    def given(self, name: str) -> Any:
        return self.args.get(name)

    def number(self, name: str, least: int) -> int:
        return self._take(name, lambda v: type(v) is int and least <= v < _LARGEST, f"a whole number from {least}", least)

    def flag(self, name: str) -> bool:
        return self._take(name, lambda v: type(v) is bool, "true or false", False)

    def choice(self, name: str, options: tuple[str, ...]) -> str:
        return self._take(name, lambda v: isinstance(v, str) and v in options, " or ".join(options), options[0])

    def _take(self, name: str, fits: Callable[[Any], bool], what: str, otherwise: Any) -> Any:
        value = self.args.get(name)
        if fits(value):
            return value
        known = isinstance(value, (int, float, str, type(None)))
        told = shown(repr(value)) if known and name in self.args else "another thing" if name in self.args else "missing"
        self.problems.append(f"{name} is {told} and must be {what}")
        return otherwise

    def finish(self, path: Path) -> None:
        if self.problems:
            raise CheckpointError(f"the model_args of {path} cannot be used: {'; '.join(self.problems)}")


def _sources(layout: _Layout) -> dict[str, list[str]]:
    """Our name -> the names in the file whose tensors make it up: one, or one for each bank of trained pairs."""
    variant = layout.config.v1.variant
    banks = layout.config.v1.persistent_banks if variant == "library" else 1
    found = {}
    for name in expected_tensors(layout.config):
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        table, rest = (_BLOCK[variant], block[2]) if block else (_ENDS[variant], name)
        stem, _, leaf = rest.rpartition(".")
        template = table.get(rest) or table[f"{stem}.*"].replace("*", leaf)
        root = f"{_ROOTS[variant]}{block[1]}." if block else ""
        count = banks if "{bank}" in template else 1
        found[name] = [root + template.format(bank=bank, **layout.words) for bank in range(count)]
    return found


def _check(layout: _Layout, sources: dict[str, list[str]], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise one CheckpointError that lists all missing, unexpected and misshapen tensors, by the names in the file."""
    config = layout.config
    ours = expected_tensors(config)
    expected: Shapes = {
        theirs: _their_shape(name, theirs, ours[name], layout) for name, list_ in sources.items() for theirs in list_
    }
    faults = [
        f"{name} is {tensorfile.dtype_name(tensors[name].dtype)}, which is no dtype for weights"
        for name in expected
        if name in tensors and tensors[name].dtype not in WEIGHT_DTYPES
    ]
    once = sum(tensors[name].numel() * tensors[name].element_size() for name in expected if name in tensors)
    if once > path.stat().st_size:
        faults.append(f"its tensors share their numbers and would be {once} bytes")
    for name, other, shape in _twins(layout, sources):
        expected[other] = shape
        if name in tensors and other in tensors and not torch.equal(tensors[name], tensors[other]):
            faults.append(f"{other} differs from {name}, which it must equal")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, wrong in _buffers(layout, tensors):
        expected[name] = found.get(name, ())
        if wrong:
            faults.append(f"{name} is not the table that its name says")
    faults = shape_faults(expected, found, faults)
    if faults:
        raise CheckpointError(f"{path} does not fit its model_args: {'; '.join(faults)}")


def _their_shape(name: str, theirs: str, shape: tuple[int, ...], layout: _Layout) -> tuple[int, ...]:
    """The shape in the file of the tensor that we call `name`."""
    heads = (layout.config.num_attention_heads,)
    if layout.config.v1.variant == "nano":
        if shape == heads and "proj" not in name and "norm" not in name:
            return (1, *heads, 1, 1)
        return (shape[0], 1, *shape[1:]) if "slot_" in name else shape
    if "slot_" in name:
        return (1, *shape[1:])
    return (*shape, 1) if theirs.endswith("conv.weight") and len(shape) == 2 else shape


def _twins(layout: _Layout, sources: dict[str, list[str]]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, other name, shape) of tensors that are stored twice."""
    config = layout.config
    if config.tie_word_embeddings:
        head = _ENDS[config.v1.variant]["lm_head.*"].replace("*", "weight")
        yield sources["model.embed_tokens.weight"][0], head, (config.vocab_size, config.hidden_size)
    for name, (theirs, *_) in sources.items():
        if layout.fast and name.endswith("key_decay"):
            yield theirs, theirs.replace("beta_w_under", "beta_u_under"), (config.num_attention_heads,)


def _buffers(layout: _Layout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, bool]]:
    """(name, whether it is wrong) of what is stored beside the weights: nano's mask and table of ages, at least of
    block_size rows; and Library's key mix where it has no effect."""
    config = layout.config
    memories = ["attn", "mlp" if config.v1.variant == "nano" else "pmem"]
    for layer in range(config.num_hidden_layers):
        for memory in memories[: 2 if config.v1.persistent_banks else 1]:
            root = f"{_ROOTS[config.v1.variant]}{layer}.{memory}"
            if layout.idle_key_mix:
                mix = tensors.get(f"{root}.k_featurizer.coef")
                yield f"{root}.k_featurizer.coef", mix is not None and mix.shape != (config.num_attention_heads,)
            if config.v1.variant == "nano":
                yield f"{root}.k_featurizer.leaky_avg.coef", _is_wrong_table(
                    tensors.get(f"{root}.k_featurizer.leaky_avg.coef"), config.max_position_embeddings, _ages
                )
                if memory == "attn":
                    mask = tensors.get(f"{root}.bias")
                    flat = mask[0, 0] if mask is not None and mask.ndim == 4 and mask.shape[:2] == (1, 1) else mask
                    yield f"{root}.bias", _is_wrong_table(flat, config.max_position_embeddings, _before)


def _is_wrong_table(table: Tensor | None, rows: int, make: Callable[[int, Tensor], Tensor]) -> bool:
    if table is None:
        return False  # missing: said with the others
    if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < rows:
        return True
    return not torch.equal(table, make(len(table), table))


def _ages(n: int, like: Tensor) -> Tensor:
    index = torch.arange(n)
    return (index - index[:, None]).clamp(max=0).to(like.dtype)


def _before(n: int, like: Tensor) -> Tensor:
    index = torch.arange(n)
    return (index < index[:, None]).to(like.dtype)


def _read(tensors: Mapping[str, Tensor], sources: list[str], shape: tuple[int, ...], path: Path) -> Tensor:
    """One of our tensors: theirs in our shape, or theirs together."""
    parts = [tensors[name] for name in sources]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.reshape(shape)


def _find_tokenizer(folder: Path) -> Path | None:
    """A tokenizer beside the checkpoint: GPT-2's two files, or one of the usual names."""
    from mmcore.data.tokenizer_files import GPT2_FILES

    pairs = (folder / first for first, second in GPT2_FILES if (folder / second).is_file())
    usual = (folder / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((file for file in (*pairs, *usual) if file.is_file()), None)

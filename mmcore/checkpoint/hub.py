"""What an exported folder holds beside its weights, so that transformers finds all it needs: the tokenizer in both
forms, where texts begin and end, the chat template, and for a mosaic the modules that define it.

Nothing here imports transformers. The modules are shipped byte for byte as they stand in mmcore/hf; this project's
own readers neither follow `auto_map` nor run any file of a folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcore.checkpoint.ends import all_ends, named_ends, one_or_more
from mmcore.data.tokenizer import FILE_KEY
from mmcore.errors import CheckpointError

if TYPE_CHECKING:
    from mmcore.data.tokenizer import Tokenizer

MODULES = ("configuration_memory_mosaics.py", "memories_memory_mosaics.py", "modeling_memory_mosaics.py")
"""The files of mmcore/hf that a mosaic's folder ships."""

AUTO_MAP = {
    "AutoConfig": "configuration_memory_mosaics.MemoryMosaicConfig",
    "AutoModel": "modeling_memory_mosaics.MemoryMosaicModel",
    "AutoModelForCausalLM": "modeling_memory_mosaics.MemoryMosaicForCausalLM",
}
"""config.json's pointer to the classes in those files, for users who pass trust_remote_code."""

CHAT_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
"""How `mm chat` draws where nothing else is said. A checkpoint of mm's that has a chat template and no settings of its own
is exported with it; a base model's generate() stays greedy."""

_IDS = {"bos_token_id", "eos_token_id", "pad_token_id"}
_PADDING = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
_MOSAIC = "memory_mosaics_v2"
_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer_config.json"


def hub_config(values: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """config.json with what transformers looks for laid over `values`: auto_map for a mosaic, and the begin and end
    tokens of `tokenizer` where `values` names none."""
    values = dict(values)
    if has_classes(values):
        values["auto_map"] = dict(AUTO_MAP)
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        values |= {key: found for key, found in ids.items() if values.get(key) is None}
    return values


def has_classes(values: Mapping[str, Any]) -> bool:
    """Whether the modules of mmcore/hf know the model: a mosaic whose keys are gated."""
    return values.get("model_type") == _MOSAIC and values.get("gated_keys", True)


def hub_files(
    values: Mapping[str, Any], tokenizer: Tokenizer | None = None, given: Mapping[str, bytes] | None = None,
    named: bool = False,
) -> dict[str, bytes]:
    """The files of an exported folder but config.json and the weights: name -> content.

    values: its config.json. tokenizer: the model's. given: tokenizer files and generation_config.json of the source
    folder; where another program made them (`made_elsewhere`) they are kept as they are, and `tokenizer` is not needed.
    named: the user named the tokenizer, whose marks then say nothing of who trained the weights.
    Raises CheckpointError where a file of `given` is no JSON.
    """
    given = dict(given or {})
    files: dict[str, bytes] = {}
    if has_classes(values):
        folder = Path(__file__).parents[1] / "hf"
        files |= {name: (folder / name).read_bytes() for name in MODULES}
    known = {key: value for key, value in read_object(given, _GENERATION).items() if value is not None}
    elsewhere = made_elsewhere(given)
    generation = generation_config(dict(values) | known, tokenizer)  # a chat model's own may lack the end of a turn
    generation |= {key: value for key, value in known.items() if elsewhere or key != "eos_token_id"}
    ours = tokenizer is not None and tokenizer.chat_template is not None and _made_here(given) and not named
    if ours and not set(known) - _IDS:
        generation = CHAT_SAMPLING | generation
    if elsewhere:
        files |= {name: content for name, content in given.items() if name != _GENERATION}
    elif tokenizer is not None:
        files |= _tokenizer_files(tokenizer)
    return files | {_GENERATION: _json(generation)}


def made_elsewhere(given: Mapping[str, bytes]) -> bool:
    """Whether a folder's tokenizer files are another program's, whole with their tokenizer_config.json."""
    return "tokenizer_class" in read_object(given, _TOKENIZER) and not _made_here(given)


def _made_here(given: Mapping[str, bytes]) -> bool:
    """Whether a folder's tokenizer files bear this project's own marks."""
    return bool({FILE_KEY, "tokenizer_file"} & set(read_object(given, _TOKENIZER)))


def generation_config(values: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """generation_config.json: the ids at which texts begin and end, <|eot_id|> too for a model that converses, and the id
    that pads a batch."""
    first = values.get("bos_token_id")
    ends = named_ends(values)
    padding = values.get("pad_token_id")
    if tokenizer is not None:
        first = tokenizer.bos_id if first is None else first
        ends = all_ends(ends, tokenizer)
        padding = tokenizer.special(_padding_token(tokenizer)) if padding is None else padding
    if padding is None and ends:
        padding = ends[0]
    result = {"bos_token_id": first, "eos_token_id": one_or_more(ends), "pad_token_id": padding}
    return {key: value for key, value in result.items() if value is not None}


def _padding_token(tokenizer: Tokenizer) -> str | None:
    """The name of the token that fills a batch: one meant for it, else the end token. Padding is never read."""
    return next((name for name in _PADDING if name in tokenizer.model.controls), tokenizer.eos_token)


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    files = tokenizer.files()
    config = read_object(files, _TOKENIZER) | {"pad_token": _padding_token(tokenizer), "padding_side": "left"}
    if tokenizer.bos_token is not None and "tokenizer.json" in files:
        files["tokenizer.json"] = with_begin_token(files["tokenizer.json"], tokenizer.bos_token, tokenizer.bos_id)
    config.pop("chat_template", None)  # it has a file of its own
    return files | {_TOKENIZER: _json({key: value for key, value in config.items() if value is not None})}


def with_begin_token(content: bytes, name: str, index: int) -> bytes:
    """A tokenizer.json that puts the token `name`, of id `index`, in front of a text, as each document that the model
    was trained on has it; one that frames texts in its own way is left alone."""
    values = json.loads(content)
    before = values.get("post_processor")
    if before is not None and before.get("type") != "ByteLevel":  # that one only counts characters
        return content

    def framed(*sequences: str) -> list[dict[str, Any]]:
        return [
            part for kind, letter in enumerate(sequences)
            for part in ({"SpecialToken": {"id": name, "type_id": kind}}, {"Sequence": {"id": letter, "type_id": kind}})
        ]

    frame = {
        "type": "TemplateProcessing", "single": framed("A"), "pair": framed("A", "B"),
        "special_tokens": {name: {"id": name, "ids": [index], "tokens": [name]}},
    }
    values["post_processor"] = frame if before is None else {"type": "Sequence", "processors": [before, frame]}
    return json.dumps(values, ensure_ascii=False).encode()


def read_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in the file `name`, empty where there is no such file. Raises CheckpointError."""
    try:
        values = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the source's {name} is no JSON ({error}): correct or remove it") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"the source's {name} holds no JSON object: correct or remove it")
    return values


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()

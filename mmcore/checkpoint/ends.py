"""Where the texts of a checkpoint begin and end: the token ids that its config.json and generation_config.json name.

Many chat models name the token that ends a turn in generation_config.json alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.formats.modelconfig import are_token_ids
from mmcore.checkpoint.untrusted import read_json, shown
from mmcore.data.tokenizer import END_OF_TURN, Tokenizer
from mmcore.errors import CheckpointError

GENERATION = "generation_config.json"


def stop_ids(checkpoint: Checkpoint) -> list[int]:
    """The ids that end a text, config.json's first. Raises CheckpointError where generation_config.json is damaged."""
    named = [*named_ends(checkpoint.config_json), *named_ends(_generation_config(checkpoint))]
    return list(dict.fromkeys(named))


def named_ends(values: Mapping[str, Any]) -> list[int]:
    """The ids that end a text, as a config.json or a generation_config.json names them."""
    ends = values.get("eos_token_id")
    return [] if ends is None else ends if isinstance(ends, list) else [ends]


def all_ends(named: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    """The ids `named` and what ends a text of the tokenizer, and, where that has a chat template, a turn."""
    turn = tokenizer.special(END_OF_TURN) if tokenizer.chat_template is not None else None
    own = [end for end in (tokenizer.eos_id, turn) if end is not None]
    return list(dict.fromkeys([*named, *own]))


def known_ends(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text by the checkpoint's word, where they are control tokens of `tokenizer` and do not begin one.
    Raises CheckpointError."""
    controls = set(tokenizer.model.controls.values())
    return [end for end in stop_ids(checkpoint) if end in controls and end != tokenizer.bos_id]


def one_or_more(ids: list[int]) -> int | list[int] | None:
    """The ids as config.json writes them."""
    return ids if len(ids) > 1 else ids[0] if ids else None


def with_all_ends(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, its config.json with what generation_config.json adds to it. Raises CheckpointError."""
    found = stop_ids(checkpoint)
    if found == named_ends(checkpoint.config_json):
        return checkpoint
    return replace(checkpoint, config_json=checkpoint.config_json | {"eos_token_id": one_or_more(found)})


def with_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[Checkpoint, str | None]:
    """The checkpoint, its config.json with the begin and end tokens of a tokenizer that it is given, and what there is to
    say about it, None where the two agree.

    What config.json and generation_config.json name counts where it is one of the tokenizer's control tokens: beside its
    end token there may be others that end a turn. Raises CheckpointError, and ConfigError for a tokenizer with more tokens
    than the model.
    """
    tokenizer.check_fits(checkpoint.config.vocab_size)
    begin, ends = checkpoint.config_json.get("bos_token_id"), stop_ids(checkpoint)
    kept = known_ends(checkpoint, tokenizer)
    values = dict(checkpoint.config_json)
    changes = []
    if tokenizer.bos_id not in (None, begin):
        values["bos_token_id"] = tokenizer.bos_id
        changes += [f"bos_token_id {begin} (now {tokenizer.bos_id})"] if begin is not None else []
    if tokenizer.eos_id is not None and (kept != ends or tokenizer.eos_id not in ends):
        values["eos_token_id"] = one_or_more(list(dict.fromkeys([*kept, tokenizer.eos_id])))
        changes += [f"eos_token_id {one_or_more(ends)} (now {values['eos_token_id']})"] if ends else []
    if not changes:
        return replace(checkpoint, config_json=values), None
    values.pop("pad_token_id", None)
    told = f"the source's {' and '.join(changes)} did not fit {tokenizer.origin}, whose own counts"
    return replace(checkpoint, config_json=values), told


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config.json of a folder, {} where there is none."""
    file = checkpoint.path / GENERATION
    values = read_json(file) if checkpoint.path.is_dir() and os.path.lexists(file) else {}
    ends = values.get("eos_token_id")
    if not are_token_ids(ends, several=True):
        raise CheckpointError(f"{file}: eos_token_id is {shown(repr(ends))} and must be a token id: correct or remove it")
    return values

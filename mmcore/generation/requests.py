"""What is asked of generation, checked before a model runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.generation.sampling import is_whole

if TYPE_CHECKING:
    from mmcore.model.language_model import LanguageModel


def default_stop_ids(model: LanguageModel) -> frozenset[int]:
    """The ids that end a text, as the checkpoint names them; none for a model that was not loaded from one."""
    return frozenset(getattr(model, "stop_ids", ()))


def check_length(max_new_tokens: int) -> None:
    """Raises ConfigError where the number of tokens to draw is no positive whole number."""
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens!r}: it must be a whole number of at least 1")


def drawable(vocab_size: int | None, size: int) -> int:
    """How many of a model's `size` ids can be drawn. Raises ConfigError where `vocab_size` is no number of ids."""
    if vocab_size is not None and (not is_whole(vocab_size) or vocab_size < 1):
        raise ConfigError(f"vocab_size is {vocab_size!r}: it must be a whole number of at least 1, or none for all")
    return size if vocab_size is None else min(int(vocab_size), size)


def checked_ids(ids: Iterable[int] | Tensor, vocab_size: int) -> list[int]:
    """`ids`, those of one text, as a list: of whole numbers of any library, or an array of one row. Raises ConfigError for
    an id that is no whole number or not one of `vocab_size`, and for several rows."""
    shape = getattr(ids, "shape", None)  # of a tensor or an array
    if shape is not None and math.prod(shape[:-1]) > 1:
        raise ConfigError(
            f"ids of shape {tuple(shape)} are several texts: give one, or all to mmcore.generation.batch.generate_batch"
        )
    ids = _listed(ids)
    for token in ids:
        if not is_whole(token) or not 0 <= token < vocab_size:
            raise ConfigError(f"the token id {token!r} is not one of the model's {vocab_size:,}: check the tokenizer")
    return list(map(int, ids))


def checked_stop_ids(stop_ids: Iterable[int] | Tensor) -> frozenset[int]:
    """`stop_ids` as drawn tokens are compared with them, from whatever `checked_ids` takes. Raises ConfigError for what are
    no whole numbers; one that the model does not have is never drawn."""
    if not isinstance(stop_ids, Iterable):
        raise ConfigError(f"stop_ids is {stop_ids!r}: give a list of token ids")
    ids = _listed(stop_ids)
    for token in ids:
        if not is_whole(token):
            raise ConfigError(f"the stop id {token!r} is no token id: give whole numbers, such as the tokenizer's eos_id")
    return frozenset(map(int, ids))


def _listed(ids: Iterable[int] | Tensor) -> list:
    """Numbers of a tensor or an array as Python's, and of tensors of one number each in a list, too."""
    if hasattr(ids, "shape"):
        return ids.reshape(-1).tolist()
    return [token.item() if isinstance(token, Tensor) and token.numel() == 1 else token for token in ids]

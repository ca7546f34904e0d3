"""The tokenizer of a run: its checkpoint's, the recipe's, or one trained on the recipe's documents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mmcore.checkpoint.formats.torchfile import is_torch_file
from mmcore.checkpoint.load import load_tokenizer as checkpoint_tokenizer
from mmcore.config import Recipe
from mmcore.data.conversations import CHAT_TEMPLATE, missing_token
from mmcore.data.corpus import obtain_tokenizer
from mmcore.data.tokenizer import Tokenizer
from mmcore.data.tokenizer_files import load_tokenizer
from mmcore.errors import ConfigError


def find_tokenizer(recipe: Recipe, known: Path | None, say: Callable[[str], None]) -> Tokenizer:
    """The tokenizer that `recipe` trains with.

    known: the tokenizer that the first weights belong to, or the file of weights that holds it; None for a fresh run.
    Raises ConfigError where the recipe names another, where it knows more tokens than the model, or where the weights'
    own cannot frame conversations.
    """
    if known is not None:
        tokenizer = checkpoint_tokenizer(known) if known.is_file() and is_torch_file(known) else load_tokenizer(known)
        if recipe.data.kind == "conversations" and (missing := missing_token(tokenizer)):
            raise ConfigError(
                f"the tokenizer of {known} has no token {missing}, which conversations need, and its weights know no other "
                f"tokenizer: write them as plain text and set data.kind to text, or begin with a checkpoint whose tokenizer "
                f"has Llama 3's chat tokens, such as one trained by mm"
            )
        if recipe.tokenizer.path is not None and _load(recipe.tokenizer.path).fingerprint != tokenizer.fingerprint:
            raise ConfigError(
                f"tokenizer.path {recipe.tokenizer.path} is not the tokenizer of {known}, whose weights know only "
                f"their own: take tokenizer.path out"
            )
    elif recipe.tokenizer.path is not None:
        tokenizer = _load(recipe.tokenizer.path)
    else:
        say(f"making a tokenizer of {recipe.tokenizer.train_vocab_size or recipe.model.vocab_size:,} pieces")
        tokenizer = obtain_tokenizer(recipe.tokenizer, recipe.data, recipe.model.vocab_size)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise ConfigError(
            f"the tokenizer knows {tokenizer.vocab_size} tokens and model.vocab_size is {recipe.model.vocab_size}: set "
            f"model.vocab_size to {tokenizer.vocab_size} or more"
        )
    if recipe.data.kind == "conversations":
        tokenizer.chat_template = CHAT_TEMPLATE
    elif known is None:
        tokenizer.chat_template = None  # a template beside a base model would promise turns that it never saw
    return tokenizer


def _load(path: str) -> Tokenizer:
    """A tokenizer file or folder; a run folder keeps its own in tokenizer/."""
    inside = Path(path) / "tokenizer"
    return load_tokenizer(inside if inside.is_dir() else path)

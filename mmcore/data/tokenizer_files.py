"""Which of the files and folders that hold a tokenizer this is, and the Tokenizer from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmcore.config.words import expanded
from mmcore.data import huggingface_tokenizer, sentencepiece_model
from mmcore.data.tokenizer import CONFIG_FILE, FILE_KEY, TEMPLATE_FILE, Tokenizer, TokenModel
from mmcore.errors import DataError

GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""GPT-2's vocabulary and merges, as OpenAI and Hugging Face name them."""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a sentencepiece model, tokenizer.json, tiktoken-style or llama2.c file, GPT-2's two files, or a
    folder with one.

    The content decides which it is, not the name, but for GPT-2's: either of the two is found beside the other. Raises
    DataError for anything else.
    """
    path = Path(expanded(path, DataError))
    file = _file_in(path) if path.is_dir() else path
    content = _read(file)
    config = _read_config(file.parent)
    origin = f"the tokenizer {path}"
    model: TokenModel
    if pair := gpt2_pair(file):
        model = huggingface_tokenizer.from_gpt2(_read(pair[0]), _read(pair[1]), origin)
    elif content[:1] == b"{":
        model = huggingface_tokenizer.from_json(content, config, origin)
    elif re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        model = huggingface_tokenizer.from_tiktoken(content, config, origin)
    elif sentencepiece_model.is_llama2c(content):
        model = sentencepiece_model.from_llama2c(content, origin)
    else:
        model = sentencepiece_model.SentencePieceModel(content, origin)
    return Tokenizer(model, config, _template_beside(file), origin)


def gpt2_pair(file: Path) -> tuple[Path, Path] | None:
    """The vocabulary and merges of a GPT-2 tokenizer of which `file` is one, by their names; None for any other file."""
    pair = next((pair for pair in GPT2_FILES if file.name in pair), None)
    return pair and (file.parent / pair[0], file.parent / pair[1])


def _template_beside(file: Path) -> str | None:
    template = file.parent / TEMPLATE_FILE
    try:
        return template.read_text("utf-8") if template.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{template} cannot be read ({error}): get it again or remove it") from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no tokenizer {file}: check the path") from None
    except OSError as error:
        raise DataError(f"the tokenizer {file} cannot be read ({error.strerror}): check its permissions") from None


def _file_in(folder: Path) -> Path:
    """The tokenizer file of a folder: the one its config names, else by the usual names."""
    config = _read_config(folder)
    named = config.get(FILE_KEY, config.get("tokenizer_file"))
    if named in ("tokenizer.json", "tokenizer.model") and (folder / named).is_file():
        return folder / named
    pairs = (vocabulary for vocabulary, merges in GPT2_FILES if (folder / merges).is_file())
    for pattern in ("tokenizer.json", "tokenizer.model", *pairs, "*.tiktoken", "*.model", "tok*.bin"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise DataError(f"{folder} holds several tokenizers ({', '.join(f.name for f in found)}): name one of them")
        if found:
            return found[0]
    raise DataError(f"{folder} holds no tokenizer: it needs tokenizer.json, tokenizer.model, tok*.bin, or encoder.json with "
                    f"vocab.bpe")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{file} is no JSON ({error}): correct or remove it") from None
    if not isinstance(config, dict):
        raise DataError(f"{file} holds no JSON object: correct or remove it")
    for key in ("bos_token", "eos_token"):
        value = config.get(key)
        if isinstance(value, dict):  # a token as text, or as {"content": text, ...}
            value = value.get("content")
        if value is not None and not _is_text(value):
            raise DataError(f"{file}: {key} is no text: correct or remove it")
    if not _are_templates(config.get("chat_template")):
        raise DataError(f"{file}: chat_template is no text, and no list of names and texts: correct or remove it")
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(isinstance(t, dict) and _is_text(t.get("content")) for t in added.values()):
        raise DataError(f"{file}: added_tokens_decoder does not name tokens: correct or remove it")
    return config


def _are_templates(value: Any) -> bool:
    """Whether a value from JSON is a chat template, several as [{"name": text, "template": text}, ...], or none."""
    if isinstance(value, list):
        return all(isinstance(row, dict) and _is_text(row.get("name")) and _is_text(row.get("template")) for row in value)
    return value is None or _is_text(value)


def _is_text(value: Any) -> bool:
    """Whether a value from JSON is text that UTF-8 can hold."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False

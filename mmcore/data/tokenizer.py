"""Text to token ids and back.

A `Tokenizer` wraps one of two models: sentencepiece pieces (sentencepiece_model.py, which also reads llama2.c's
.bin vocabularies and trains new ones) or a Hugging Face tokenizer.json (huggingface_tokenizer.py, which also
reads tiktoken-style files and GPT-2's). Both say which bytes each id stands for; decoding joins those bytes, so that
streaming, byte counts and whole-text decoding agree by construction.

Encoding yields ordinary text tokens only. Control tokens (begin, end, chat headers) enter a sequence by id
alone: text that spells "<|end_of_text|>" stays text.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmcore.errors import ConfigError, DataError

BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
END_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
END_OF_TURN = "<|eot_id|>"
CHAT_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", END_OF_TURN)
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
FILE_KEY = "mm_file"
"""The key of tokenizer_config.json that names the file to read where there are several. (Checkpoints of before have
tokenizer_file, which some versions of transformers take for a path of their own.)"""


class TokenModel(Protocol):
    """What a tokenizer file offers, whichever library reads it."""

    file_name: str
    """The name the file has in a saved folder."""
    file_bytes: bytes
    """The file, byte for byte."""

    def identity(self) -> bytes:
        """What of the file decides the ids of a text."""

    size: int
    """Highest id + 1."""
    controls: dict[str, int]
    """Control tokens by name; text must never encode to one."""
    leading_space: bool
    """Whether encoding puts a space in front of the text, which decoding takes away again."""
    space_after_control: bool
    """Whether it also does so where the text follows a control token."""

    def encode(self, text: str) -> list[int]: ...

    def encode_further(self, text: str) -> list[int]:
        """`encode` without the space in front, for text that goes on after other text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes of each id; control tokens stand for b""."""

    def companion_files(self) -> dict[str, bytes]:
        """Further files that other programs need to read the same tokenizer."""


class Tokenizer:
    """A token model with its begin and end tokens.

    Attributes: `vocab_size` (highest id + 1), `bos_id`, `eos_id` (None where the model has none),
    `chat_template` (jinja text or None), `other_templates` (the names of those for other uses, where there is none).
    """

    def __init__(self, model: TokenModel, config: dict[str, Any] | None = None, chat_template: str | None = None,
                 origin: str = "the tokenizer"):
        config = config or {}
        self.model = model
        self.origin = origin
        self.vocab_size = model.size
        written = config.get("chat_template")
        named = {row["name"]: row["template"] for row in written} if isinstance(written, list) else {"default": written}
        self.chat_template = chat_template or named.pop("default", None)
        self.other_templates = tuple(named) if self.chat_template is None else ()
        self.bos_token = self._pick(config.get("bos_token"), BEGIN_NAMES)
        self.eos_token = self._pick(config.get("eos_token"), END_NAMES)
        self.bos_id = self.special(self.bos_token)
        self.eos_id = self.special(self.eos_token)
        self._control_ids = frozenset(model.controls.values())
        self._pieces: list[bytes] | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the ids."""
        digest = hashlib.sha256(f"{self.model.file_name}:{self.bos_id}:{self.eos_id}:".encode())
        digest.update(self.model.identity())
        return digest.hexdigest()

    def _pick(self, configured: Any, names: Iterable[str]) -> str | None:
        if isinstance(configured, dict):  # tokenizer_config.json holds a token as text or as {"content": text, ...}
            configured = configured.get("content")
        if configured is not None and configured not in self.model.controls:
            raise DataError(f"{self.origin}: {CONFIG_FILE} names {configured!r}, which the tokenizer lacks: correct it")
        return configured or next((name for name in names if name in self.model.controls), None)

    def special(self, name: str | None) -> int | None:
        """The id of the control token called `name`, or None."""
        return None if name is None else self.model.controls.get(name)

    def check_fits(self, vocabulary: int) -> None:
        """Raise ConfigError where a model with a vocabulary of so many tokens does not know all of these."""
        if self.vocab_size > vocabulary:
            raise ConfigError(
                f"the tokenizer knows {self.vocab_size:,} tokens and the model {vocabulary:,}: use the tokenizer that the "
                f"model was trained with"
            )

    def frame(self) -> tuple[int, int]:
        """The ids that open and close a document; one token may do both. Raises DataError where there is none."""
        begin = self.bos_id if self.bos_id is not None else self.eos_id
        end = self.eos_id if self.eos_id is not None else self.bos_id
        if begin is None or end is None:
            raise DataError(f"{self.origin} has no begin or end token: name bos_token and eos_token in {CONFIG_FILE}")
        return begin, end

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of `text`, never a control token. `continues` says that other text goes before, so that a sentencepiece
        model puts no space in front. Raises DataError for text that UTF-8 cannot hold."""
        _refuse_surrogates(text)
        ids = self.model.encode_further(text) if continues else self.model.encode(text)
        return ids if self._control_ids.isdisjoint(ids) else self._encode_spelled(text, continues)

    def encode_after_control(self, text: str) -> list[int]:
        """`encode` of text that follows a control token, as it is within the whole text."""
        return self.encode(text, continues=not self.model.space_after_control)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        for text in texts:
            _refuse_surrogates(text)
        rows = self.model.encode_batch(texts)
        return [ids if self._control_ids.isdisjoint(ids) else self._encode_spelled(text)
                for text, ids in zip(texts, rows, strict=True)]

    def _encode_spelled(self, text: str, continues: bool = False) -> list[int]:
        """Encode text whose model matches control tokens in it: each name is cut after its first character."""
        names = "|".join(re.escape(name) for name in sorted(self.model.controls, key=len, reverse=True) if name)
        cuts = [0, *(match.start() + 1 for match in re.finditer(names, text)), len(text)]
        encoders = itertools.chain([self.model.encode_further if continues else self.model.encode],
                                   itertools.repeat(self.model.encode_further))
        parts = (text[start:end] for start, end in itertools.pairwise(cuts))
        ids = [i for encode, part in zip(encoders, parts, strict=False) for i in encode(part)]
        if not self._control_ids.isdisjoint(ids):
            raise DataError(f"{self.origin} turns plain text into control tokens: use another tokenizer")
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False, continues: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD.

        `special` writes control tokens by name instead of leaving them out; `continues` says that other text goes
        before, so that a sentencepiece model's leading space is kept.
        """
        pieces = self._pieces_of(ids, special)
        return b"".join(self._trim(pieces, continues)).decode("utf-8", errors="replace")

    def _pieces_of(self, ids: Iterable[int], special: bool = False) -> list[bytes]:
        table = self.token_bytes()
        names = {index: name.encode() for name, index in self.model.controls.items()} if special else {}
        try:
            return [names.get(i) or table[i] for i in map(int, ids) if i >= 0 or _refuse_id(i, self)]
        except IndexError:
            raise DataError(f"a token id is beyond {self.origin}, which knows {self.vocab_size}") from None

    def _trim(self, pieces: list[bytes], continues: bool) -> list[bytes]:
        """Take the space away that encoding put before the first piece."""
        if not self.model.leading_space or continues:
            return pieces
        for index, piece in enumerate(pieces):
            if piece:
                return [*pieces[:index], piece.removeprefix(b" "), *pieces[index + 1:]]
        return pieces

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for, [vocab_size]; control tokens stand for none."""
        if self._pieces is None:
            self._pieces = self.model.token_bytes()
        return self._pieces

    def byte_lengths(self) -> np.ndarray:
        """int32 [vocab_size]: bytes of text behind each id; what bits per byte divides by."""
        return np.array([len(piece) for piece in self.token_bytes()], dtype=np.int32)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the files that `load_tokenizer(folder)` and an exported checkpoint need; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, content in self.files().items():
            paths.append(folder / name)
            paths[-1].write_bytes(content)
        return paths

    def files(self) -> dict[str, bytes]:
        """What `save` writes: file name -> content."""
        config: dict[str, Any] = {
            # transformers 4.57 and 5 both accept this class name; 5's own choice is refused by 4.57
            "tokenizer_class": "PreTrainedTokenizerFast",
            FILE_KEY: self.model.file_name,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "clean_up_tokenization_spaces": False,
        }
        config = {key: value for key, value in config.items() if value is not None}
        files = {self.model.file_name: self.model.file_bytes, **self.model.companion_files()}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
            files[TEMPLATE_FILE] = self.chat_template.encode()
        files[CONFIG_FILE] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return files


class StreamDecoder:
    """Decodes ids one at a time into whole characters.

    The texts of all `push` calls and of the closing `finish` join to `tokenizer.decode(ids, continues=continues)`.
    """

    def __init__(self, tokenizer: Tokenizer, *, continues: bool = False):
        self._tokenizer = tokenizer
        self._started = continues or not tokenizer.model.leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes; "" while a character is still missing bytes."""
        (piece,) = self._tokenizer._pieces_of([token_id])
        if piece and not self._started:
            piece = piece.removeprefix(b" ")
            self._started = True
        return self._decoder.decode(piece)

    def copy(self) -> StreamDecoder:
        """Another decoder that is at the same point of the text."""
        other = StreamDecoder(self._tokenizer, continues=self._started)
        other._decoder.setstate(self._decoder.getstate())
        return other

    def finish(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _refuse_surrogates(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"the text holds half of a surrogate pair at character {error.start}: remove it") from None


def _refuse_id(token_id: int, tokenizer: Tokenizer) -> bool:
    raise DataError(f"{token_id} is no token id of {tokenizer.origin}, which knows 0 to {tokenizer.vocab_size - 1}")

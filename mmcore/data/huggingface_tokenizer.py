"""Hugging Face tokenizer.json models, and tiktoken-style files converted to them.

A tiktoken-style file (Llama 3's tokenizer.model) is a table "base64 bytes, rank". It becomes a byte-level BPE of
the tokenizers library, which every installation has, with the same ids: the tiktoken library is not needed.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

from mmcore.config.words import whole_number
from mmcore.data.tokenizer import BEGIN_NAMES, CHAT_TOKENS, END_NAMES
from mmcore.errors import DataError

_MOST_IDS = 1 << 22
_CONTROL_NAME = re.compile(r"<\|[^|]*\|>")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_SPACE = "\u2581"

# Llama 3's own way to cut text into words, and its 256 control tokens (Meta's llama3/tokenizer.py).
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3_CONTROLS = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
                    9: "<|eot_id|>"}


class HuggingFaceModel:
    """A tokenizer.json (see TokenModel)."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes, declared: Sequence[str], origin: str):
        """`declared`: names that tokenizer_config.json gives as begin, end or chat tokens."""
        self.file_bytes = content
        if _SUBWORD_PREFIX.search(content):  # tokenizers 0.23 panics over shorter merges
            raise DataError(f"{origin} marks pieces within words by a prefix, as WordPiece does: use a BPE without one")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except BaseException as error:  # noqa: BLE001 (bare Exception for every fault in a file, and Rust's panics)
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            told = str(error)[:300]
            told = told if told.isprintable() else ascii(told)  # it quotes the file
            raise DataError(f"{origin} is no tokenizer.json that can be read ({told})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # control tokens spelled in text are text
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
        if self.size > _MOST_IDS:  # tables of this size are made
            raise DataError(f"{origin} has the token id {self.size - 1}, above {_MOST_IDS}: the file is damaged")
        wanted = {*declared, *BEGIN_NAMES, *END_NAMES, *CHAT_TOKENS}
        self.controls = {
            token.content: i for i, token in sorted(self._added.items())
            if token.special or token.content in wanted or _CONTROL_NAME.fullmatch(token.content)
        }
        for name in declared:  # a begin or end token may be an ordinary row of the vocabulary
            row = self._tokenizer.token_to_id(name)
            if row is not None:
                self.controls.setdefault(name, row)
        self._kind = _decoder_kind(self._tokenizer.decoder, origin)
        self.leading_space = self._kind != "bytes" and self._puts_space_first()
        self.space_after_control = self.leading_space and self._puts_space_after_control()

    def _puts_space_first(self, control: str = "") -> bool:
        """Whether a space is put before a text, or before one that follows the token `control`."""
        tokens = self._tokenizer.encode(f"{control}a", add_special_tokens=False).tokens
        first = tokens.index(control) + 1 if control in tokens else 0
        return first < len(tokens) and tokens[first].startswith(_SPACE)

    def _puts_space_after_control(self) -> bool:
        name = next((token.content for token in self._added.values() if token.special), None)
        if name is None:
            return True
        self._tokenizer.encode_special_tokens = False
        try:
            return self._puts_space_first(name)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_further(self, text: str) -> list[int]:
        if not self.leading_space:
            return self.encode(text)
        return self._further.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _further(self) -> tokenizers.Tokenizer:
        """The tokenizer without a space in front."""
        found = tokenizers.Tokenizer.from_buffer(_without_space_in_front(self.file_bytes))
        found.no_truncation()
        found.no_padding()
        found.encode_special_tokens = True
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [row.ids for row in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def token_bytes(self) -> list[bytes]:
        table = [b""] * self.size
        byte_of = {letter: byte for byte, letter in _byte_letters().items()}
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if self._kind == "bytes":
                # A row with a letter outside the table cannot come from text; show it as it is written.
                known = all(letter in byte_of for letter in piece)
                table[i] = bytes(byte_of[letter] for letter in piece) if known else piece.encode()
            elif found := _BYTE_PIECE.fullmatch(piece):
                table[i] = bytes([int(found[1], 16)])
            else:
                table[i] = piece.replace(_SPACE, " ").encode()
        for i, token in self._added.items():
            table[i] = token.content.encode()
        for i in self.controls.values():
            table[i] = b""
        return table

    def identity(self) -> bytes:
        """The file without its post_processor, which other programs use to put the begin token in front: an exported
        folder may have another one."""
        values = json.loads(self.file_bytes)
        values.pop("post_processor", None)
        return json.dumps(values, sort_keys=True).encode()

    def companion_files(self) -> dict[str, bytes]:
        return {}


def _without_space_in_front(content: bytes) -> bytes:
    """A tokenizer.json whose Prepend and Metaspace steps put no space in front of a text."""
    values = json.loads(content)
    normalizer = values.get("normalizer") or {}
    kept = [step for step in normalizer.get("normalizers", [normalizer]) if step.get("type") not in (None, "Prepend")]
    values["normalizer"] = {"type": "Sequence", "normalizers": kept}
    cutter = values.get("pre_tokenizer") or {}
    for step in cutter.get("pretokenizers", [cutter]):
        if step.get("type") == "Metaspace":
            step |= {"prepend_scheme": "never"}
            step.pop("add_prefix_space", None)  # what older files say in its place
    return json.dumps(values, ensure_ascii=False).encode()


def _decoder_kind(step: Any, origin: str) -> str:
    """"bytes" for GPT-2's byte letters, "pieces" for sentencepiece-like pieces. Raises DataError for others."""
    decoder = json.loads(step.__getstate__()) if step is not None else {}
    steps = [step.get("type") for step in decoder.get("decoders", [decoder])]
    if "ByteLevel" in steps:
        return "bytes"
    if "ByteFallback" in steps or "Metaspace" in steps:
        return "pieces"
    raise DataError(f"{origin} decodes by {steps[0] or 'nothing'}, which loses text: use a ByteLevel, ByteFallback or "
                    f"Metaspace tokenizer.json")


def from_json(content: bytes, config: dict[str, Any], origin: str) -> HuggingFaceModel:
    """The model in a tokenizer.json; `config` is the tokenizer_config.json beside it, or {}."""
    declared = [token.get("content") if isinstance(token, dict) else token
                for token in (config.get("bos_token"), config.get("eos_token"))]
    return HuggingFaceModel(content, [name for name in declared if name], origin)


def from_tiktoken(content: bytes, config: dict[str, Any], origin: str) -> HuggingFaceModel:
    """The model behind a tiktoken-style table with Llama 3's word pattern and control tokens.

    Control tokens take the 256 ids after the table, named as tokenizer_config.json beside the file names them
    (later Llamas renamed some), else as Meta's code does. Raises DataError for a damaged table.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{origin}: line {number} is not 'base64 rank': the file is damaged") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{origin} does not number its {len(ranks)} rows from 0: the file is damaged")
    names = _llama3_names(len(ranks), config)
    letters = _byte_letters()

    def spell(word: bytes) -> str:
        return "".join(letters[byte] for byte in word)

    values = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for i, name in names.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_WORDS}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {spell(word): rank for word, rank in ranks.items()},
            "merges": [[spell(left), spell(right)] for left, right in _merges(ranks)],
        },
    }
    return HuggingFaceModel(json.dumps(values, ensure_ascii=False).encode(), (), origin)


def from_gpt2(vocabulary: bytes, merges: bytes, origin: str) -> HuggingFaceModel:
    """The model behind GPT-2's two files: encoder.json (or vocab.json), a row's byte letters to its id, and vocab.bpe
    (or merges.txt), the pairs to merge in order. `<|endoftext|>` is its one control token. Raises DataError."""
    try:
        rows = json.loads(vocabulary.decode("utf-8"))
        lines = merges.decode("utf-8").split("\n")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} has a vocabulary that is no JSON, or merges that are no text ({error})") from None
    if not isinstance(rows, dict) or not rows or not all(type(i) is int and 0 <= i < len(rows) for i in rows.values()):
        raise DataError(f"{origin} has a vocabulary that does not number its rows from 0: get encoder.json again")
    if len(set(rows.values())) < len(rows):
        raise DataError(f"{origin} has a vocabulary that gives one id to two rows: get encoder.json again")
    try:
        "".join(rows).encode()
    except UnicodeEncodeError:
        raise DataError(f"{origin} has a vocabulary with half of a surrogate pair: get encoder.json again") from None
    pairs = [line.removesuffix("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= rows.keys():
            told = " ".join(pair)[:60]
            raise DataError(f"{origin} merges {told!r}, which its vocabulary lacks: get both files from one place")
    end = rows.get("<|endoftext|>")
    added = [] if end is None else [
        {"id": end, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ]
    values = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": rows, "merges": pairs,
        },
    }
    return HuggingFaceModel(json.dumps(values, ensure_ascii=False).encode(), (), origin)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to join two rows into a third, in the order of the joined row's rank (tiktoken's merge order)."""
    merges = []
    for word in sorted(ranks, key=ranks.__getitem__):
        splits = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
        splits = [(left, right) for left, right in splits if left in ranks and right in ranks]
        merges += sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _llama3_names(first: int, config: dict[str, Any]) -> dict[int, str]:
    """Names of the 256 control ids that follow the table."""
    names = {}
    reserved = 0
    for offset in range(256):
        if offset in _LLAMA3_CONTROLS:
            names[first + offset] = _LLAMA3_CONTROLS[offset]
        else:
            names[first + offset] = f"<|reserved_special_token_{reserved}|>"
            reserved += 1
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if (number := whole_number(key)) in names:
            names[number] = token["content"]
    return names


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(0x100 + len(letters) - len(printable)))
    return letters

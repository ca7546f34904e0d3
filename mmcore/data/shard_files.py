"""One shard's files, written from documents; shards.py says what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmcore.data.conversations import ChatFormat, is_learnt
from mmcore.data.files import write_atomically
from mmcore.data.tokenizer import Tokenizer

DOCUMENT = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("hash", "<u8"), ("words", "<u8")])
"""Of one document: framed length in tokens, text length in UTF-8 bytes, and the first 64 bits of the BLAKE2b of its text,
and of its text without the line ends around it: a part of a .txt has none, a row of a .jsonl may keep them."""

_ENCODED_AT_ONCE = 1 << 20  # characters; keeps the Python lists of ids small


def write_shard(stem: Path, texts: Sequence[bytes], tokenizer: Tokenizer, kind: str) -> None:
    """Tokenize documents (UTF-8; conversations as JSON) and write one shard, its .json last."""
    dtype = token_type(tokenizer)
    masks: list[np.ndarray] = []
    if kind == "conversations":
        rows = [json.loads(text) for text in texts]
        chat = ChatFormat(tokenizer)
        ids, masks = _conversations(rows, chat, dtype)
        answers = sum(is_learnt(message) and bool(message["content"].strip()) for row in rows for message in row)
        weighted = any("weight" in message for row in rows for message in row)
        as_before = 3 if not all(map(chat.is_same_apart, rows)) else 2 if weighted else 1
    else:
        ids, answers = list(_framed(texts, tokenizer, dtype)), 0
        as_before = 1
    table = np.array([document_record(text, len(row)) for text, row in zip(texts, ids, strict=True)], DOCUMENT)
    parts = {".bin": np.concatenate(ids), ".docs": table}
    if masks:
        parts[".mask"] = np.concatenate(masks)
    facts = {"documents": len(texts), "tokens": int(table["tokens"].sum()), "bytes": int(table["bytes"].sum()),
             "answers": answers, "as_before": as_before, "files": {}}
    for ending, array in parts.items():
        content = memoryview(array.view(np.uint8)).cast("B")
        write_atomically(stem.with_suffix(ending), content)
        facts["files"][ending] = [len(content), hashlib.sha256(content).hexdigest()]
    write_atomically(stem.with_suffix(".json"), json.dumps(facts).encode())


def document_record(text: bytes, tokens: int = 0) -> tuple[int, int, int, int]:
    """The DOCUMENT record of a text."""
    return tokens, len(text), _hash(text), _hash(text.strip(b"\r\n"))


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _conversations(rows: Sequence[list[dict[str, Any]]], chat: ChatFormat,
                   dtype: np.dtype) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Each conversation's ids, and its mask."""
    made = [chat.conversation(row) for row in rows]
    return [np.array(ids, dtype) for ids, _ in made], [np.array(trained, np.uint8) for _, trained in made]


def _framed(texts: Sequence[bytes], tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Each document's ids between the begin and the end token."""
    begin, end = tokenizer.frame()
    group: list[str] = []
    size = 0
    for number, text in enumerate(texts, 1):
        group.append(text.decode())
        size += len(group[-1])
        if size < _ENCODED_AT_ONCE and number < len(texts):
            continue
        for row in tokenizer.encode_batch(group):
            framed = np.empty(len(row) + 2, dtype)
            framed[0], framed[1:-1], framed[-1] = begin, row, end
            yield framed
        group, size = [], 0


def token_type(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type that holds the tokenizer's ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

"""One shard's files, written from documents; shards.py says what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mmcore.data.conversations import ChatFormat
from mmcore.data.files import write_atomically
from mmcore.data.tokenizer import Tokenizer

DOCUMENT = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("hash", "<u8")])
"""Of one document: framed length in tokens, text length in UTF-8 bytes, the first 64 bits of the text's BLAKE2b."""

_ENCODED_AT_ONCE = 1 << 20  # characters; keeps the Python lists of ids small


def write_shard(stem: Path, texts: Sequence[bytes], tokenizer: Tokenizer, kind: str) -> None:
    """Tokenize documents (UTF-8; conversations as JSON) and write one shard, its .json last."""
    dtype = token_type(tokenizer)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    if kind == "conversations":
        chat = ChatFormat(tokenizer)
        for text in texts:
            row, trained = chat.conversation(json.loads(text))
            ids.append(np.array(row, dtype))
            masks.append(np.array(trained, np.uint8))
    else:
        ids = list(_framed(texts, tokenizer, dtype))
    table = np.array([document_record(text, len(row)) for text, row in zip(texts, ids, strict=True)], DOCUMENT)
    parts = {".bin": np.concatenate(ids), ".docs": table}
    if masks:
        parts[".mask"] = np.concatenate(masks)
    facts = {"documents": len(texts), "tokens": int(table["tokens"].sum()), "bytes": int(table["bytes"].sum()),
             "files": {}}
    for ending, array in parts.items():
        content = memoryview(array.view(np.uint8)).cast("B")
        write_atomically(stem.with_suffix(ending), content)
        facts["files"][ending] = [len(content), hashlib.sha256(content).hexdigest()]
    write_atomically(stem.with_suffix(".json"), json.dumps(facts).encode())


def document_record(text: bytes, tokens: int = 0) -> tuple[int, int, int]:
    """The DOCUMENT record of a text."""
    return tokens, len(text), int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


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

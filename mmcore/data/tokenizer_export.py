"""A sentencepiece BPE model as tokenizer.json, so that transformers and others read an exported checkpoint.

Merging pairs by the score of the piece they make, as sentencepiece does, is BPE with one merge for every way to
split every piece, in the order of the pieces' scores. Both give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SPACE = "\u2581"
_BPE, _UNIGRAM = 2, 1  # TrainerSpec.ModelType


def proto_fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field of a serialized protobuf message: numbers as int, all else as bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = content[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while position < len(content):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = {1: 8, 5: 4}[kind] if kind != 2 else varint()
        yield key >> 3, content[position:position + length]
        position += length


def is_plain_bpe(model: bytes) -> bool:
    """Whether a sentencepiece model is BPE that leaves the text as it is, which tokenizer.json can express."""
    blocks = {number: value for number, value in proto_fields(model) if number in (2, 3) and isinstance(value, bytes)}
    trainer, normalizer = dict(proto_fields(blocks.get(2, b""))), dict(proto_fields(blocks.get(3, b"")))
    # defaults of sentencepiece_model.proto where a field is not written
    return trainer.get(3, _UNIGRAM) == _BPE and not normalizer.get(2) and normalizer.get(4, 1) == 0


def bpe_json(pieces: Sequence[str], scores: Sequence[float], ordinary: Sequence[int], controls: Mapping[str, int],
             unknown: int, leading_space: bool) -> bytes:
    """tokenizer.json of a byte-fallback BPE; `ordinary` are the ids that merging may make.

    Only control tokens are found in a text by their names; <unk>, which byte fallback never needs, is none of them.
    """
    # Without a leading space the pieces are written with the space itself, and U+2581 is a character like any other.
    shown = list(pieces) if leading_space else [piece.replace(_SPACE, " ") for piece in pieces]
    known = {shown[i]: i for i in ordinary}
    merges: list[tuple[float, int, int, list[str]]] = []
    for i in ordinary:
        piece = shown[i]
        for cut in range(1, len(piece)):
            left, right = known.get(piece[:cut]), known.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], left, right, [piece[:cut], piece[cut:]]))
    merges.sort(key=lambda merge: merge[:3])
    normalizer: dict[str, Any] | None = None
    undo: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if leading_space:
        normalizer = {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": _SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        ]}
        undo.insert(0, {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "})
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    values = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for name, i in sorted(controls.items(), key=lambda x: x[1])
        ],
        "normalizer": normalizer,
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": undo},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": shown[unknown], "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(shown)}, "merges": [merge[3] for merge in merges],
        },
    }
    return json.dumps(values, ensure_ascii=False).encode()

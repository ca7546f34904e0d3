"""General-purpose compressors on the same text: the figures a language model must beat to have learnt anything."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable


def compressed_bits_per_byte(texts: Iterable[str]) -> dict[str, float]:
    """Bits for each byte of the UTF-8 texts, joined in order into one stream, by `gzip -9` and `xz -9`.

    Headers are counted. Both see the whole stream and nothing else; a model has seen its training text as well.
    """
    stream = "".join(texts).encode("utf-8")
    if not stream:
        raise ValueError("there is no text to compress")
    return {
        "gzip -9": 8 * len(gzip.compress(stream, 9, mtime=0)) / len(stream),
        "xz -9": 8 * len(lzma.compress(stream, preset=9)) / len(stream),
    }

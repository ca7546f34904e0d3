"""Documents to tokens to packed batches. One global sample index names every sample, so that resuming is exact at
any world size.

`obtain_tokenizer` and `prepare` turn a recipe's sections into a Tokenizer and a Corpus; `Samples` cuts a store into
windows; `Loader` gives out batches. Names are imported when they are used, so that reading a tokenizer needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcore.data.conversations import CHAT_TEMPLATE, ChatFormat
    from mmcore.data.corpus import Corpus, obtain_tokenizer, prepare
    from mmcore.data.loader import IGNORED, Batch, Loader
    from mmcore.data.packing import Sample, Samples
    from mmcore.data.sentencepiece_model import train_sentencepiece
    from mmcore.data.store import TokenStore
    from mmcore.data.tokenizer import StreamDecoder, Tokenizer
    from mmcore.data.tokenizer_files import load_tokenizer

_HOMES = {
    "CHAT_TEMPLATE": "conversations", "ChatFormat": "conversations",
    "Corpus": "corpus", "obtain_tokenizer": "corpus", "prepare": "corpus",
    "IGNORED": "loader", "Batch": "loader", "Loader": "loader",
    "Sample": "packing", "Samples": "packing",
    "train_sentencepiece": "sentencepiece_model",
    "TokenStore": "store",
    "StreamDecoder": "tokenizer", "Tokenizer": "tokenizer", "load_tokenizer": "tokenizer_files",
}

__all__ = [
    "CHAT_TEMPLATE", "IGNORED", "Batch", "ChatFormat", "Corpus", "Loader", "Sample", "Samples", "StreamDecoder",
    "TokenStore", "Tokenizer", "load_tokenizer", "obtain_tokenizer", "prepare", "train_sentencepiece",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Memory Mosaics v2: the model, its training and its evaluation.

`import mmcore` is light: the entry points below import torch when they are first used.

    model = mmcore.load_model("checkpoint/")          # mmcore/checkpoint/load.py
    tokenizer = mmcore.load_tokenizer("checkpoint/")  # mmcore/checkpoint/load.py
    for token in mmcore.generate(model, prompt_ids, max_new_tokens=64): ...  # mmcore/generation/engine.py
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_ENTRY_POINTS = {
    "load_model": "mmcore.checkpoint.load",
    "load_tokenizer": "mmcore.checkpoint.load",
    "generate": "mmcore.generation.engine",
}

__all__ = ["__version__", *_ENTRY_POINTS]


def __getattr__(name: str) -> Any:
    if name not in _ENTRY_POINTS:
        raise AttributeError(f"module 'mmcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ENTRY_POINTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ENTRY_POINTS})

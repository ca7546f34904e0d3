"""What every readable format becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.config import ModelConfig


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. Its names and shapes have been compared with its configuration; no weight was read yet."""

    format: str
    """A name from formats.FORMATS."""
    path: Path
    """The folder or file."""
    config: ModelConfig
    config_json: dict[str, Any]
    """config.json as it is on disk, or as it would be."""
    tensors: Mapping[str, Tensor]
    """Contract names (Hugging Face's for the baseline) -> weights, read when asked for; NaN is refused then."""
    weight_files: tuple[Path, ...]
    """The files that hold the weights."""
    tokenizer_path: Path | None
    """A folder with a tokenizer's files, or a llama2.c tokenizer file; None where there is none."""
    dtype: torch.dtype
    """Of the widest weights."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The tokenizer's files where they are part of the weights' file."""


class Reopened(Mapping[str, Tensor]):
    """Weights that are read through once, in the memory of a few tensors.

    The pages of a mapped file that were read count as this process's memory until nothing maps the file any more, so
    the files are opened anew after every 64 MB. `reopen` gives the mapping of weights afresh.
    """

    LIMIT = 64 << 20

    def __init__(self, specs: Mapping[str, TensorSpec], reopen: Callable[[], Mapping[str, Tensor]]):
        self.specs, self._reopen = specs, reopen
        self._open: Mapping[str, Tensor] | None = None
        self._read = 0

    def __getitem__(self, name: str) -> Tensor:
        if self._open is None or self._read > self.LIMIT:
            self._open, self._read = None, 0  # let go of the old mapping first
            self._open = self._reopen()
        tensor = self._open[name]
        self._read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

"""A model run one block at a time, so that its logits can be had where it does not fit into memory.

Only one block's weights (in fp32), the embedding's rows that are asked for, and a piece of the classifier are in
memory at once. The arithmetic is that of the whole model on a CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.load import model_from
from mmcore.checkpoint.names import CLASSIFIER, EMBEDDING
from mmcore.config import ModelConfig
from mmcore.kernels.allocator import give_back_pages

_PIECE = 64 << 20
"""Bytes of the classifier, in fp32, that are in memory at once."""

PARTS = ("memory_mosaics_v2", "llama", "long_short_transformer")
"""Model types whose blocks can be run alone."""


class Layerwise:
    """Steps through a model for tokens int64 [1, T]: `embed`, each `block`, then `logits` piece by piece.

    disturb: every weight is made larger or smaller by this share of itself, at random (`disturbed`).
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], disturb: float = 0.0):
        from mmcore.model import build_model  # here, so that opening a checkpoint does not load the kernels
        from mmcore.model.documents import packing

        with torch.device("meta"):
            self._model = build_model(config)
        self._tensors, self._where = tensors, packing(None)
        self.config, self._disturb = config, disturb
        self.blocks = config.num_hidden_layers

    def embed(self, tokens: Tensor) -> Tensor:
        """[1, T, d] fp32."""
        return disturbed(self._tensors[EMBEDDING][tokens].float(), EMBEDDING, self._disturb)

    @torch.no_grad()
    def block(self, number: int, x: Tensor) -> Tensor:
        """[1, T, d] -> [1, T, d]."""
        block = self._model.model.layers[number]
        self._fill(block, f"model.layers.{number}.")
        try:
            return block(x, self._where, self.config.long_term_delay, frozenset())
        finally:
            block.to("meta")
            give_back_pages()  # else the peak of a conversion was up to twice as high, differently in each run

    @torch.no_grad()
    def logits(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, logits fp32 [T, rows]) of successive pieces of the vocabulary."""
        norm = self._model.model.norm
        self._fill(norm, "model.norm.")
        y = norm(x)[0]
        weight = self._tensors[EMBEDDING if self.config.tie_word_embeddings else CLASSIFIER]
        rows = max(1, _PIECE // (4 * weight.shape[1]))
        for start in range(0, len(weight), rows):
            piece = disturbed(weight[start : start + rows].float(), f"{CLASSIFIER}/{start}", self._disturb)
            yield start, F.linear(y, piece)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        for name, _ in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = disturbed(self._tensors[prefix + name].to(torch.float32, copy=True), prefix + name, self._disturb)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


class Whole:
    """The same steps for a model whose blocks cannot be run alone: it is in memory whole."""

    blocks = 0

    @torch.no_grad()
    def __init__(self, checkpoint: Checkpoint, disturb: float = 0.0):
        self._model = model_from(checkpoint, dtype=torch.float32)
        for name, parameter in self._model.named_parameters() if disturb else ():
            parameter.copy_(disturbed(parameter, name, disturb))

    def embed(self, tokens: Tensor) -> Tensor:
        """The tokens as they are."""
        return tokens

    def block(self, number: int, x: Tensor) -> Tensor:
        """There is none."""
        raise IndexError(number)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(0, logits fp32 [T, V])."""
        yield 0, self._model(x)[0].float()


def steps_of(checkpoint: Checkpoint, disturb: float = 0.0) -> Layerwise | Whole:
    """How to run a checkpoint with little memory."""
    if checkpoint.config.model_type in PARTS:
        return Layerwise(checkpoint.config, checkpoint.tensors, disturb)
    return Whole(checkpoint, disturb)


def disturbed(weight: Tensor, name: str, share: float) -> Tensor:
    """weight * (1 +- share), the signs drawn by the name; the weight itself where share is 0."""
    if not share:
        return weight
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    signs = torch.randint(0, 2, weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return weight * (1 - share + 2 * share * signs)

"""A language model of a few lines with the decoding interface of the real ones, and a tokenizer of bytes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcore.config import ModelConfig


class FakeState:
    """A running vector for each row: what comes next depends on all that came before."""

    def __init__(self, batch_size: int, width: int, padding: Tensor | None) -> None:
        self.length = 0
        self.padding = padding
        self.vector = torch.zeros(batch_size, width)

    @property
    def bytes(self) -> int:
        return self.vector.nbytes

    def tensors(self) -> dict[str, Tensor]:
        return {"vector": self.vector, "length": torch.tensor(self.length)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.vector, self.length = tensors["vector"].clone(), int(tensors["length"])

    def mark(self) -> tuple[int, Tensor]:
        return self.length, self.vector  # which is replaced, never changed

    def rewind(self, mark: tuple[int, Tensor]) -> None:
        self.length, self.vector = mark

    def take_back(self) -> None:
        self.vector, self.length, passes = self.before
        passes.pop()
        del self.before


class FakeModel(nn.Module):
    """h <- tanh(a h + E[token]), logits = 4 C h. `passes` counts the tokens read, in pieces."""

    def __init__(self, vocab_size: int = 64, seed: int = 0, width: int = 16) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size=vocab_size, hidden_size=width, num_attention_heads=1,
                                  max_position_embeddings=64)
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(vocab_size, width, generator=generator))
        self.classifier_weight = nn.Parameter(torch.randn(vocab_size, width, generator=generator))
        self.knocked_out: frozenset[str] = frozenset()
        self.passes: list[int] = []

    def new_state(self, batch_size: int = 1, padding: Tensor | None = None) -> FakeState:
        return FakeState(batch_size, self.embedding.shape[1], padding)

    def takes_back(self, state: FakeState) -> bool:
        return False

    @torch.no_grad()
    def advance(self, tokens: Tensor, state: FakeState, last_only: bool = True) -> Tensor:
        self.passes.append(tokens.shape[1])
        state.before = state.vector, state.length, self.passes
        for column in tokens.unbind(1):
            new = torch.tanh(0.9 * state.vector + self.embedding[column])
            if state.padding is not None:
                new = torch.where((state.length >= state.padding)[:, None], new, state.vector)
            state.vector = new
            state.length += 1
        return 4 * state.vector @ self.classifier_weight.T

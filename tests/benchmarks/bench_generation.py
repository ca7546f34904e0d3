"""What the stream of tokens costs beside the model: python -m tests.benchmarks.bench_generation [--json FILE]

For each way to choose tokens and each vocabulary, `generate` on a model that costs nothing (one stored row of
logits, as peaked as a trained model's: standard deviation 4), in microseconds of processor time a token. The bare
loop of calls to that model is measured in turn and taken off. Medians of 15 rounds, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from mmcore.generation.engine import generate

TOKENS = 200
ROUNDS = 15
CHOICES = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
}


class FreeModel:
    """`advance` returns the same logits every time."""

    def __init__(self, vocab_size: int) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(0)) * 4

    def parameters(self) -> Iterator[torch.Tensor]:
        yield self.logits

    def new_state(self, batch_size: int = 1) -> SimpleNamespace:
        return SimpleNamespace(length=0)

    def advance(self, tokens: torch.Tensor, state: SimpleNamespace) -> torch.Tensor:
        state.length += tokens.shape[1]
        return self.logits


def bare(model: FreeModel) -> float:
    """Seconds a token of calls to the model alone."""
    state, token = model.new_state(), torch.zeros(1, 1, dtype=torch.int64)
    started = time.process_time()
    for _ in range(TOKENS):
        model.advance(token, state)
    return (time.process_time() - started) / TOKENS


def streamed(model: FreeModel, settings: dict) -> float:
    """Seconds a token of the whole stream."""
    started = time.process_time()
    for _ in generate(model, [1], max_new_tokens=TOKENS, **settings):
        pass
    return (time.process_time() - started) / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for vocab_size in (8192, 128_256):
        model = FreeModel(vocab_size)
        for name, settings in CHOICES.items():
            pairs = [(streamed(model, settings), bare(model)) for _ in range(ROUNDS)]
            cost = statistics.median(whole - alone for whole, alone in pairs) * 1e6
            rows.append({"vocabulary": vocab_size, "choice": name, "microseconds_a_token": round(cost, 1)})
            print(f"{vocab_size:>8,}  {name:12} {cost:8.1f} us a token")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The loss by token position: what a longer context is worth to a model, out to far beyond the trained one.

Position p is the number of tokens read before the predicted one, the begin token counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TIMES_TRAINED = 8
"""How far past the trained context the loss is measured."""

FIRST_BIN = 4
"""The first bin ends no earlier."""


@dataclass(frozen=True)
class Sequences:
    """Token sequences of one length, cut from a text."""

    tokens: list[np.ndarray]
    """int64 [length + 1] each: a begin token (where the tokenizer has one) and the text's tokens."""
    length: int
    """Predicted tokens of each, the last position."""
    concatenated: bool
    """Whether documents were joined, because none was long enough alone."""


@dataclass(frozen=True)
class Bin:
    """Positions first .. last, both ends included."""

    first: int
    last: int
    loss: float
    """Mean, nats a token."""
    standard_error: float | None
    """Of the mean, over sequences (tokens of one text are not independent); None with a single sequence."""
    count: int
    """Tokens."""


def bin_edges(trained: int, longest: int) -> list[int]:
    """Rising last positions of the bins. From trained / 16 on there are two for each doubling; trained, 2 trained,
    4 trained ... are among them and `longest` is the last. Below there is one for each doubling, and none ends before
    4: a bin of one position would show single tokens of a few sequences."""
    edges, step = {longest}, 0
    while (edge := round(trained * 2 ** (step / 2))) >= FIRST_BIN:
        if edge <= longest and (step % 2 == 0 or 16 * edge >= trained):
            edges.add(edge)
        step -= 1
    step = 0
    while (edge := round(trained * 2 ** (step / 2))) < longest:
        if edge >= FIRST_BIN:
            edges.add(edge)
        step += 1
    return sorted(edges)


def by_position(losses: np.ndarray, trained: int) -> list[Bin]:
    """Bins of losses [sequences, length], column p - 1 holding position p."""
    count, longest = losses.shape
    bins, first = [], 1
    for last in bin_edges(trained, longest):
        part = losses[:, first - 1 : last].astype(np.float64)
        means = part.mean(axis=1)
        error = float(means.std(ddof=1) / np.sqrt(count)) if count > 1 else None
        bins.append(Bin(first, last, float(part.mean()), error, part.size))
        first = last + 1
    return bins


def cut_sequences(
    texts: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    begin: int | None,
    length: int,
    most: int,
) -> Sequences | None:
    """At most `most` sequences of `length` predicted tokens, from documents at least that long: the beginning of each
    document first, then the second stretch of each, and so on, no token twice.

    Where no document is long enough all are joined by a blank line, in order; where that is too short as well there
    is one sequence of all there is. None for a text of fewer than two tokens.
    """
    head = [] if begin is None else [begin]
    need = length + 1 - len(head)
    stretches = []
    for text in texts:
        # A token is at least a byte, so most short documents need no tokenizing to be ruled out.
        if len(stretches) < most and len(text.encode("utf-8")) >= need:
            stretches += [found] if (found := _stretches(encode([text])[0], need)) else []
    concatenated = not stretches
    if concatenated:
        ids = encode(["\n\n".join(texts)])[0]
        need = min(need, len(ids))
        stretches = [_stretches(ids, need)] if need else []
    longest = max(map(len, stretches), default=0)
    chosen = [document[turn] for turn in range(longest) for document in stretches if turn < len(document)][:most]
    tokens = [np.array(head + stretch, dtype=np.int64) for stretch in chosen]
    if not tokens or len(tokens[0]) < 2:
        return None
    return Sequences(tokens, len(tokens[0]) - 1, concatenated)


def _stretches(ids: list[int], size: int) -> list[list[int]]:
    """Consecutive whole pieces of `size` tokens."""
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]

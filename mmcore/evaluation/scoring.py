"""The loss of every token of a text, each scored exactly once.

A document is framed as in training (begin token, its tokens, end token) and read through windows of `context`
tokens that advance by `stride`: the first window scores all its tokens, every later one only the tokens that the
window before has not scored, so past the first window a token is predicted from at least context - stride + 1
tokens. Windows of several documents share a row, told apart by document ids, so that short documents cost no
padding. The classifier's output never exists for more than a chunk of tokens (see linear_cross_entropy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

IGNORED = -100
OPEN_ROWS = 16
"""Rows that wait for a window that fits. One row alone leaves a fifth of it empty on short stories."""

Progress = Callable[[int, int], None]
"""Called as progress(tokens read, tokens to read)."""


@dataclass(frozen=True)
class Window:
    """A piece of one document: inputs [start, stop) are read, and the targets of [scored_from, stop) are scored.
    Target i is the token after input i."""

    document: int
    start: int
    stop: int
    scored_from: int

    def __len__(self) -> int:
        return self.stop - self.start


def windows(length: int, context: int, stride: int, document: int = 0) -> Iterator[Window]:
    """The windows over a document of `length` inputs; together they score each target once."""
    start = scored = 0
    while scored < length:
        stop = min(start + context, length)
        yield Window(document, start, stop, scored)
        start, scored = start + stride, stop


def pack(pieces: Sequence[Window], context: int) -> list[list[Window]]:
    """Rows of windows, at most `context` tokens each. First fit over the last few open rows."""
    rows: list[list[Window]] = []
    open_rows: list[tuple[int, int]] = []  # (row, room left)
    for piece in pieces:
        for slot, (row, room) in enumerate(open_rows):
            if len(piece) <= room:
                rows[row].append(piece)
                open_rows[slot] = (row, room - len(piece))
                break
        else:
            rows.append([piece])
            open_rows.append((len(rows) - 1, context - len(piece)))
            if len(open_rows) > OPEN_ROWS:
                open_rows.remove(min(open_rows, key=lambda entry: entry[1]))
    return rows


def score_documents(
    model: torch.nn.Module,
    documents: Sequence[np.ndarray],
    context: int,
    stride: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Losses in nats of framed documents (int64, begin and end tokens included): for each of n tokens, n - 1 values
    in float32, the first that of the token after the first.

    `model.loss(tokens, labels, documents=, reduction="none")` is called on [batch_size, context] tokens at a time.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride {stride} must lie between 1 and the context, {context}")
    pieces = [
        window for index, tokens in enumerate(documents)
        for window in windows(len(tokens) - 1, context, stride, index)
    ]
    rows = pack(pieces, context)
    losses = [np.full(max(0, len(tokens) - 1), np.nan, dtype=np.float32) for tokens in documents]
    done, total = 0, sum(map(len, pieces))
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        found = _score_rows(model, documents, batch, device)
        for row, values in zip(batch, found, strict=True):
            position = 0
            for piece in row:
                scored = values[position + piece.scored_from - piece.start : position + len(piece)]
                losses[piece.document][piece.scored_from : piece.stop] = scored
                position += len(piece)
                done += len(piece)
        if progress:
            progress(done, total)
    return losses


@torch.no_grad()
def _score_rows(
    model: torch.nn.Module, documents: Sequence[np.ndarray], rows: list[list[Window]], device: torch.device | str
) -> np.ndarray:
    """Losses [rows, longest row], meaningless where nothing is scored."""
    width = max(sum(map(len, row)) for row in rows)
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    owners = np.zeros((len(rows), width), dtype=np.int32)
    for index, row in enumerate(rows):
        position = 0
        for number, piece in enumerate(row, start=1):
            source = documents[piece.document]
            end = position + len(piece)
            tokens[index, position:end] = source[piece.start : piece.stop]
            first = position + piece.scored_from - piece.start
            labels[index, first:end] = source[piece.scored_from + 1 : piece.stop + 1]
            owners[index, position:end] = number
            position = end
    tensors = (torch.from_numpy(array).to(device) for array in (tokens, labels, owners))
    tokens_BT, labels_BT, documents_BT = tensors
    losses_BT = model.loss(tokens_BT, labels_BT, documents=documents_BT, reduction="none")
    return losses_BT.float().view(len(rows), width).cpu().numpy()


@torch.no_grad()
def score_sequence(model: torch.nn.Module, tokens: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Losses in nats, float32 [n - 1], of one sequence of n tokens read whole in one forward pass."""
    row = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64)).to(device)[None]
    return model.loss(row[:, :-1], row[:, 1:], reduction="none").float().view(-1).cpu().numpy()

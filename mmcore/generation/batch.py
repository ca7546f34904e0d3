"""Generation of several rows at once, which are read and drawn together.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.generation import sampling as drawing
from mmcore.generation.engine import chunk_of
from mmcore.generation.requests import check_length, checked_ids, checked_stop_ids, default_stop_ids, drawable
from mmcore.generation.sampling import Draw, Sampling, uniform

if TYPE_CHECKING:
    from mmcore.model.language_model import LanguageModel


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Iterable[int] | Tensor | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
) -> list[list[int]]:
    """The ids that go on with each of the prompts, of any lengths, read and drawn together.

    Row i draws as `generate` does with seed + i. A row ends with the first id of `stop_ids`, as the stream does.
    Raises ConfigError for no prompts, an empty one, or settings out of range.
    """
    check_length(max_new_tokens)
    sampling = Sampling(temperature, top_k, top_p, seed)
    size = model.config.vocab_size
    words = drawable(vocab_size, size)
    rows = [checked_ids(prompt, size) for prompt in prompts]
    if not rows or not all(rows):
        raise ConfigError("a prompt is empty: give each at least one token, such as the tokenizer's bos_id")
    stops = checked_stop_ids(default_stop_ids(model) if stop_ids is None else stop_ids)
    longest = max(map(len, rows))
    padding = [longest - len(row) for row in rows]
    device = next(model.parameters()).device
    state = model.new_state(len(rows), padding=torch.tensor(padding, device=device) if any(padding) else None)
    tokens_BT = torch.tensor([[0] * pad + row for pad, row in zip(padding, rows, strict=False)], device=device)
    for piece_BT in tokens_BT.split(chunk or chunk_of(len(rows)), dim=1):
        logits_BV = model.advance(piece_BT, state)

    def draw(logits_BV: Tensor, count: int) -> Draw:
        points = [uniform(seed + i, len(row) + count) if temperature else 0.0 for i, row in enumerate(rows)]
        return Draw(logits_BV[:, :words], sampling, points)

    return draw_rows(model, state, logits_BV, draw, stops, max_new_tokens)


def draw_rows(
    model: LanguageModel,
    state: Any,
    logits_BV: Tensor,
    draw: Callable[[Tensor, int], Draw],
    stops: frozenset[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """The ids that rows go on with from `state` and the logits [B, V] behind it: `draw(logits, count)` draws each row's next
    after `count` of them. A row ends with the first id of `stops`."""
    answers: list[list[int]] = [[] for _ in logits_BV]
    sure = True  # that no row has to be drawn twice
    for count in range(max_new_tokens):
        drawn, last, ahead = draw(logits_BV, count), count + 1 == max_new_tokens, None
        if logits_BV.device.type in drawing.ASYNCHRONOUS and sure and not last and model.takes_back(state):
            ahead = model.advance(drawn.unseen().unsqueeze(1), state)  # before they are known: a GPU is never idle
        for answer, token in zip(answers, drawn.ids(), strict=True):
            if not answer or answer[-1] not in stops:
                answer.append(token)
        sure = not drawn.again
        over = last or all(answer[-1] in stops for answer in answers)
        if ahead is not None and (over or not sure):
            state.take_back()
            ahead = None
        if over:
            break
        # Rows that have ended go on reading what they draw; nobody looks at it.
        logits_BV = model.advance(drawn.tokens.unsqueeze(1), state) if ahead is None else ahead
    return answers

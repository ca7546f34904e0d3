"""What a trained model can do with a language it was trained on, and at sizes it never saw."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from mmcore.claims.languages import Episode, Language, Stream
from mmcore.data.loader import IGNORED, make_batch
from mmcore.model import LanguageModel

TOKENS_AT_ONCE = 16_384
HELD_OUT = 1 << 40
"""First seed of episodes that are never trained on."""


@torch.no_grad()
def accuracy(
    model: LanguageModel,
    language: Language,
    size: int,
    episodes: int,
    questions: int,
    without: Iterable[str] = (),
) -> tuple[int, int]:
    """Questions answered right, and asked, over `episodes` of the given size: the same ones for every model.

    An answer is right where the likeliest token is the right one at each of its tokens, given those before it; where the
    episode gives laws, where it is a token that can follow.
    """
    random = np.random.default_rng([HELD_OUT, size])
    drawn = [language.episode(random, size, questions) for _ in range(episodes)]
    device, was_training, knocked_out = model.model.embed_tokens.weight.device, model.training, model.knocked_out
    model.eval().without(without)
    right = 0
    at_once = max(1, TOKENS_AT_ONCE // max(len(episode.tokens) for episode in drawn))
    for first in range(0, episodes, at_once):
        some = drawn[first : first + at_once]
        tokens, answers = _side_by_side(some)
        hidden = model.hidden(tokens[:, :-1].to(device))[answers[:, 1:].to(device)]
        likeliest = model.lm_head(hidden).argmax(-1).cpu()
        if some[0].laws is None:
            hits = likeliest == tokens[:, 1:][answers[:, 1:]]
        else:
            hits = torch.from_numpy(np.concatenate([episode.laws for episode in some]))[range(len(likeliest)), likeliest] > 0
        right += int(hits.view(-1, language.answer).all(dim=1).sum())
    model.train(was_training).without(knocked_out)
    return right, episodes * questions


def _side_by_side(episodes: list[Episode]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 and answers bool [B, T], filled up on the right, where no question can see it."""
    longest = max(len(episode.tokens) for episode in episodes)
    tokens = torch.zeros(len(episodes), longest, dtype=torch.int64)
    answers = torch.zeros(len(episodes), longest, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        tokens[row, : len(episode.tokens)] = torch.from_numpy(episode.tokens)
        answers[row, : len(episode.tokens)] = torch.from_numpy(episode.answers)
    return tokens, answers


@torch.no_grad()
def answer_loss(model: LanguageModel, language: Language, sequence_length: int, samples: int = 64) -> float:
    """Mean cross-entropy of the answers in the training distribution, nats a token, on samples never trained on."""
    device, was_training = model.model.embed_tokens.weight.device, model.training
    model.eval()
    batch = make_batch(Stream(language, sequence_length, HELD_OUT), range(samples))
    total = 0.0
    size = max(1, TOKENS_AT_ONCE // sequence_length)
    for parts in zip(*(part.split(size) for part in (batch.tokens, batch.labels, batch.documents)), strict=True):
        total += float(model.loss(*(part.to(device) for part in parts), reduction="sum"))
    model.train(was_training)
    return total / max(1, int((batch.labels != IGNORED).sum()))


def checkpoints_of_a_curve(steps: int, points: int = 12) -> list[int]:
    """Steps at which to look: evenly spaced on a logarithmic axis from a hundredth of the way on."""
    first = max(1, steps // 100)
    return sorted({round(first * math.exp(math.log(steps / first) * i / (points - 1))) for i in range(points)})

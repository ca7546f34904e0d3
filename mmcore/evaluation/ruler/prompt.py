"""A prompt with its answers, and how RULER scores what a model says to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Prompt:
    """One item of a task."""

    text: str
    """Everything up to the answer prefix."""
    prefix: str
    """The beginning of the answer, which the model is given and goes on from."""
    answers: tuple[str, ...]
    tokens: int
    """Of text and prefix, by the model's tokenizer, the begin token not counted."""
    depth: float | None
    """Where in the context the (first) asked fact begins: 0 at its start, 1 at its end."""
    index: int
    """Of the question, or of the sample."""

    @property
    def given(self) -> str:
        """What the model reads."""
        return self.text + self.prefix


def clean(prediction: str) -> str:
    """A prediction as RULER compares it: control characters are newlines, the ends are stripped."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def match_part(prediction: str, answers: tuple[str, ...]) -> float:
    """1 where any of the answers is contained in the prediction, capitals ignored (string_match_part: qa)."""
    said = clean(prediction).lower()
    return float(any(answer.lower() in said for answer in answers))


def match_all(prediction: str, answers: tuple[str, ...]) -> float:
    """The share of the answers that the prediction contains, capitals ignored (string_match_all: niah)."""
    said = clean(prediction).lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)

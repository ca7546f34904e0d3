"""RULER's needles in a haystack: sentences that give a key a value, hidden in a long text; the keys are asked for last."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from mmcore.errors import DataError
from mmcore.evaluation.ruler import ANSWER_TOKENS
from mmcore.evaluation.ruler.prompt import Prompt
from mmcore.evaluation.ruler.qa import Count
from mmcore.evaluation.ruler.words import ADJECTIVES, NOUNS

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(i * 100 / 39) for i in range(40))
"""Percent of the text before a needle in running text."""

_SENTENCE_END = re.compile(r"(?<=[.!?][\"'”’)])\s+|(?<=[.!?])\s+")


@dataclass(frozen=True)
class Needles:
    """One of the tasks."""

    haystack: str
    """noise, essay (running text) or needle (lines that are other needles)."""
    keys: int = 1
    values: int = 1
    """Values of each key."""
    queries: int = 1
    key_kind: str = "words"
    value_kind: str = "numbers"


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value_kind="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


def sentences(text: str) -> list[str]:
    """Running text in sentences, white space made single spaces."""
    return [" ".join(part.split()) for part in _SENTENCE_END.split(text) if part.strip()]


def prompts(
    name: str, length: int, samples: int, count: Count, essay: list[str] | None = None, seed: int = 0
) -> Iterator[Prompt]:
    """`samples` prompts of a task that with their answers hold at most `length` tokens.

    `essay`: the words of the running text, for the tasks that have it as their haystack. The amount of hay is what
    fits sample 0, in steps of RULER's sizes (500 words, 25 lines, or a tenth and a fifth of that below 4,096 tokens);
    a sample that is too long loses a step at a time. Raises DataError where not even one step fits.
    """
    task = TASKS[name]
    step = (500 if length >= 4096 else 50) if task.haystack == "essay" else (25 if length >= 4096 else 5)
    budget = length - ANSWER_TOKENS["niah"]

    def build(index: int, hay: int) -> Prompt:
        text, prefix, answers, depth = _build(task, hay, random.Random(f"{seed}/{name}/{length}/{index}"), essay)
        return Prompt(text, prefix, answers, count(text + prefix), depth, index)

    hay = _most(lambda units: build(0, units).tokens <= budget, step)
    for index in range(samples):
        units = max(hay, step)
        while (prompt := build(index, units)).tokens > budget:
            if units <= step:
                raise DataError(
                    f"{name} takes {prompt.tokens + ANSWER_TOKENS['niah']:,} tokens with its smallest haystack, more than "
                    f"{length:,}: ask for a greater length"
                )
            units -= step
        yield prompt


def _most(fits, step: int) -> int:
    """The greatest multiple of `step` that fits, 0 for none."""
    low, high = 0, 1
    while fits(high * step):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _build(
    task: Needles, hay: int, draw: random.Random, essay: list[str] | None
) -> tuple[str, str, tuple[str, ...], float]:
    """Text, answer prefix, answers, depth of the first needle that is asked for."""
    keys: dict[str, list[str]] = {}
    while len(keys) < max(task.keys, task.queries):
        keys.setdefault(_draw(task.key_kind, draw), [_draw(task.value_kind, draw) for _ in range(task.values)])
    pairs = list(keys.items())
    needles = [_needle(task.value_kind, key, value) for key, values in pairs for value in values]
    asked = draw.sample(range(len(pairs)), task.queries)
    wanted = {_needle(task.value_kind, pairs[i][0], value) for i in asked for value in pairs[i][1]}
    draw.shuffle(needles)
    context = _hide(task, hay, needles, draw, essay)
    first = min(context.find(needle) for needle in wanted)
    query = _join([pairs[i][0] for i in asked])
    text, prefix = _template(task.value_kind, query, context, alone=task.queries * task.values == 1)
    answers = tuple(value for i in asked for value in pairs[i][1])
    return text, prefix, answers, first / max(1, len(context))


def _draw(kind: str, draw: random.Random) -> str:
    if kind == "numbers":
        return str(draw.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def _needle(kind: str, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _hide(task: Needles, hay: int, needles: list[str], draw: random.Random, essay: list[str] | None) -> str:
    if task.haystack == "essay":
        return _hide_in_text(hay, needles, draw, essay or [])
    if task.haystack == "noise":
        lines = [NOISE] * hay
    else:
        lines = []
        while len(lines) < hay:
            key, value = _draw(task.key_kind, draw), _draw(task.value_kind, draw)
            # A line that gave an asked key a second value would make the question ambiguous.
            if not any(f" for {key} is: " in needle for needle in needles):
                lines.append(_needle(task.value_kind, key, value))
    places = sorted(draw.sample(range(hay), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):  # from the end, so that places stay what they are
        lines.insert(place, needle)
    return "\n".join(lines)


def _hide_in_text(hay: int, needles: list[str], draw: random.Random, words: list[str]) -> str:
    """The first `hay` words, repeated where there are fewer, with the needles between sentences."""
    repeated = words * (hay // len(words) + 1)
    found = sentences(" ".join(repeated[:hay]))
    places = sorted(int(len(found) * depth / 100) for depth in draw.sample(DEPTHS, len(needles)))
    pieces, last = [], 0
    for place, needle in zip(places, needles, strict=True):
        pieces += [*found[last:place], needle]
        last = place
    return " ".join([*pieces, *found[last:]])


def _join(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"


def _template(kind: str, query: str, context: str, alone: bool) -> tuple[str, str]:
    """The prompt and the beginning of its answer; with one value of one key asked for, in the singular.

    (As published the singular is made by replacing words wherever they stand in the finished template, whose own
    words these are.)
    """
    some, are, what = ("A", "is", kind.removesuffix("s")) if alone else ("Some", "are", kind)
    are_all = "is" if alone else "are all"
    text = (
        f"{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {what} afterwards.\n{context}\n"
        f"What {are_all} the special magic {what} for {query} mentioned in the provided text?"
    )
    return text, f" The special magic {what} for {query} mentioned in the provided text {are}"

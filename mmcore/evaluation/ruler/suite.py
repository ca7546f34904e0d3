"""The new-knowledge suite: every task at every length, one item at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mmcore.evaluation.intervals import wilson
from mmcore.evaluation.journal import Journal, key_of, shorten
from mmcore.evaluation.reading import Reader
from mmcore.evaluation.ruler import ANSWER_TOKENS, QA_TASKS, niah, qa
from mmcore.evaluation.ruler.documents import Pool
from mmcore.evaluation.ruler.prompt import Prompt, match_all, match_part

DEPTH_BINS = 5

Tick = Callable[[float], None]
"""Called with the share of the work that is done."""


@dataclass(frozen=True)
class Sources:
    """What the prompts are made of; a task whose part is missing cannot be built."""

    pools: dict[str, Pool]
    """qa_1 and qa_2."""
    essay: list[str] | None = None
    """Words of running text."""


def prompts(task: str, length: int, samples: int, sources: Sources, reader: Reader, seed: int,
            published: bool) -> Iterable[Prompt]:
    """The prompts of a task at a length, by the reader's count of tokens."""
    if task in QA_TASKS:
        return qa.prompts(sources.pools[task], length, samples, reader.count, seed, published)
    return niah.prompts(task, length, samples, reader.count, sources.essay, seed)


def measure(
    task: str, length: int, samples: int, sources: Sources, reader: Reader, journal: Journal, identity: Any, *,
    seed: int = 0, published: bool = False, tick: Tick | None = None,
) -> dict[str, Any]:
    """Score a task at a length, as a row of plain values.

    `identity`: JSON values that name the model (the hash of its checkpoint, what was removed); with the prompt's text
    they are an item's key in the journal. `score` is a mean in percent, as RULER gives it; `by_depth` has one entry
    for each fifth of the context.
    """
    family = "qa" if task in QA_TASKS else "niah"
    match = match_part if family == "qa" else match_all
    scored: list[tuple[Prompt, float]] = []
    for prompt in prompts(task, length, samples, sources, reader, seed, published):
        key = key_of("new-knowledge", identity, task, length, prompt.given, prompt.answers)
        record = journal.get(key)
        if record is None:
            # What holds every answer goes on holding it: a model that knows is spared most of its 128 tokens.
            enough = functools.partial(_complete, match, prompt.answers)
            said = reader.complete(prompt.given, ANSWER_TOKENS[family], enough)
            record = journal.put(key, {
                "suite": "new-knowledge", "model": identity, "task": task, "length": length, "index": prompt.index,
                "tokens": prompt.tokens, "depth": prompt.depth, "prompt": shorten(prompt.given),
                "prompt_sha256": key_of(prompt.given), "answers": list(prompt.answers), "prediction": said,
                "score": match(said, prompt.answers),
            })
        scored.append((prompt, record["score"]))
        if tick:
            tick(len(scored) / samples)
    hits = sum(score for _, score in scored)
    low, high = wilson(hits, len(scored))
    return {
        "task": task, "length": length, "items": len(scored), "score": 100 * hits / len(scored),
        "interval": [100 * low, 100 * high],
        "tokens": round(sum(prompt.tokens for prompt, _ in scored) / len(scored), 1),
        "by_depth": by_depth([(prompt.depth, score) for prompt, score in scored]),
    }


def _complete(match: Callable[[str, tuple[str, ...]], float], answers: tuple[str, ...], said: str) -> bool:
    return match(said, answers) == 1.0


def by_depth(scored: Iterable[tuple[float | None, float]]) -> list[dict[str, Any]]:
    """Scores in percent by where in the context the fact stood, in equal parts from the beginning to the end."""
    bins: list[list[float]] = [[] for _ in range(DEPTH_BINS)]
    for depth, score in scored:
        if depth is not None:
            bins[min(DEPTH_BINS - 1, int(depth * DEPTH_BINS))].append(score)
    return [
        {"from": part / DEPTH_BINS, "to": (part + 1) / DEPTH_BINS, "items": len(found),
         "score": 100 * sum(found) / len(found) if found else None}
        for part, found in enumerate(bins)
    ]

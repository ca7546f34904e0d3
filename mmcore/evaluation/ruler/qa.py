"""RULER's qa_1 (SQuAD) and qa_2 (HotpotQA): documents first, question last.

As published, the documents of every sample are shuffled by a generator with the same seed, so that for a given number
of documents the paragraph that answers a SQuAD question is always in the same place; and a sample that stays too long
loses ten documents at a time for ever, which hangs below about 2,000 tokens. Here each sample has a seed of its own,
and takes as many documents as its budget holds, down to the needed ones alone. `published=True` builds the prompts as
published, and says where it would hang.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from mmcore.errors import DataError
from mmcore.evaluation.ruler import ANSWER_TOKENS
from mmcore.evaluation.ruler.documents import Pool, Question
from mmcore.evaluation.ruler.prompt import Prompt

ANSWER_PREFIX = " Answer:"
STEP = 10
PUBLISHED_SEED = 42

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)

Count = Callable[[str], int]


def render(documents: list[str], question: str) -> str:
    """The prompt up to the answer prefix."""
    context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, start=1))
    return f"{_INSTRUCTION}\n\nThe following are given documents.\n\n{context}\n\n{_INSTRUCTION}\n\nQuestion: {question}"


def prompts(pool: Pool, length: int, samples: int, count: Count, seed: int = 0, published: bool = False) -> Iterator[Prompt]:
    """At most `samples` prompts (one for each question at most) that with their answers hold at most `length` tokens.

    The questions are drawn by the seed, or, as published, taken in the file's order. A question whose needed documents
    alone are too long for the budget is passed over. Raises DataError where no prompt fits.
    """
    if published:
        yield from _published(pool, length, samples, count)
        return
    # Text seeds: the draws depend on these words alone, on any machine.
    order = list(range(len(pool.questions)))
    random.Random(f"{seed}/{pool.kind}/questions").shuffle(order)
    costs: dict[int, int] = {}
    made, shortest = 0, None
    for index in order:
        if made == samples:
            return
        prompt = _fill(pool, index, length, count, random.Random(f"{seed}/{pool.kind}/{length}/{index}"), costs)
        if isinstance(prompt, Prompt):
            made += 1
            yield prompt
        else:
            shortest = min(prompt, shortest or prompt)
    if not made:
        raise DataError(
            f"no question of {pool.path} fits into {length:,} tokens: its shortest prompt takes {shortest:,}; ask for a "
            f"greater length"
        )


def _fill(
    pool: Pool, index: int, length: int, count: Count, draw: random.Random, costs: dict[int, int]
) -> Prompt | int:
    """A prompt with as many documents as fit, or the tokens that the least one would take."""
    question = pool.questions[index]
    chosen = list(question.needed)
    budget = length - ANSWER_TOKENS["qa"]
    least = count(_given(pool, chosen, question))
    if least > budget:
        return least + ANSWER_TOKENS["qa"]
    left = budget - least
    for place in _others(pool, question, draw):
        if place not in costs:
            costs[place] = count(f"Document 100:\n{pool.documents[place]}\n\n")
        if costs[place] > left:
            break
        left -= costs[place]
        chosen.append(place)
    while True:
        order = list(range(len(chosen)))
        draw.shuffle(order)
        prompt = _given(pool, [chosen[place] for place in order], question)
        tokens = count(prompt)
        if tokens <= budget or len(chosen) == len(question.needed):
            text = prompt.removesuffix(ANSWER_PREFIX)
            return Prompt(text, ANSWER_PREFIX, question.answers, tokens, _depth(text, pool, question.needed), index)
        chosen.pop()


def _others(pool: Pool, question: Question, draw: random.Random) -> Iterator[int]:
    """Documents to fill a prompt with: the question's own and its article's, then the pool, over and over."""
    own = [place for place in (*question.given, *question.related) if place not in question.needed]
    draw.shuffle(own)
    yield from own
    rest = [place for place in range(len(pool.documents)) if place not in {*question.needed, *own}]
    fresh = True
    while rest or (own and not fresh):
        draw.shuffle(rest)
        yield from rest
        # A pool smaller than the prompt repeats itself, the needed documents never: their depth stays one place.
        if fresh:
            rest, fresh = rest + own, False


def _given(pool: Pool, places: list[int], question: Question) -> str:
    return render([pool.documents[place] for place in places], question.text) + ANSWER_PREFIX


def _depth(text: str, pool: Pool, needed: tuple[int, ...]) -> float | None:
    """Where the first of the needed documents begins, as a share of all documents' text."""
    start = text.find("Document 1:\n")
    end = text.rfind(f"\n\n{_INSTRUCTION}")
    found = [text.find(f":\n{pool.documents[place]}", start) for place in needed]
    first = min((place for place in found if place >= 0), default=None)
    return None if first is None else min(1.0, max(0.0, (first - start - len("Document 1")) / max(1, end - start)))


def _published(pool: Pool, length: int, samples: int, count: Count) -> Iterator[Prompt]:
    """Prompts as published: one generator seeded with 42 draws the documents, the search for their number included."""
    draw = random.Random(PUBLISHED_SEED)
    answer = ANSWER_TOKENS["qa"]

    def build(index: int, number: int) -> str:
        question = pool.questions[index]
        documents = [pool.documents[place] for place in _published_choice(pool, question, number, draw)]
        random.Random(PUBLISHED_SEED).shuffle(documents)
        return render(documents, question.text) + ANSWER_PREFIX

    number = _published_number(lambda number: count(build(0, number)) + answer, length)
    for index in range(min(samples, len(pool.questions))):
        used = number
        needed = len(pool.questions[index].given)
        while True:
            given = build(index, used)
            tokens = count(given)
            if tokens + answer <= length:
                break
            if used - STEP < max(1, needed):
                raise DataError(
                    f"question {index} of {pool.path} takes {tokens + answer:,} tokens with {used} documents, more than "
                    f"{length:,}: the published construction never ends there; leave --ruler-exact out, or ask for a "
                    f"greater length"
                )
            used -= STEP
        text = given.removesuffix(ANSWER_PREFIX)
        depth = _depth(text, pool, pool.questions[index].needed)
        yield Prompt(text, ANSWER_PREFIX, pool.questions[index].answers, tokens, depth, index)


def _published_choice(pool: Pool, question: Question, number: int, draw: random.Random) -> list[int]:
    """Which documents, before they are shuffled."""
    given, related = list(question.given), list(question.related)
    if number >= len(pool.documents):
        return [place % len(pool.documents) for place in range(number)]
    wanted = number - len(given)
    if wanted > len(related):
        taken = {*given, *related}
        rest = [place for place in range(len(pool.documents)) if place not in taken]
        return given + related + draw.sample(rest, wanted - len(related))
    return given + draw.sample(related, max(0, wanted))


def _published_number(tokens: Callable[[int], int], length: int) -> int:
    """The number of documents, by a binary search on question 0."""
    each = tokens(STEP) - ANSWER_TOKENS["qa"]
    low, high = STEP, max(2 * STEP, int(length / (each / STEP) * 3))
    best = STEP
    while low <= high:
        middle = (low + high) // 2
        if tokens(middle) <= length:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return best

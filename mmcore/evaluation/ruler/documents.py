"""Questions with the paragraphs that answer them, from files in the SQuAD and HotpotQA formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.errors import DataError


@dataclass(frozen=True)
class Question:
    """A question on a pool of documents."""

    text: str
    answers: tuple[str, ...]
    """Any one of them counts; duplicates are kept."""
    needed: tuple[int, ...]
    """Documents of the pool that hold the answer."""
    given: tuple[int, ...]
    """What the published construction always includes: the paragraph (SQuAD), the question's ten (HotpotQA)."""
    related: tuple[int, ...]
    """Others that are taken before any at random: the rest of the article (SQuAD)."""


@dataclass(frozen=True)
class Pool:
    """Unique documents, sorted, and the questions in the file's order."""

    kind: str
    """squad or hotpotqa."""
    path: str
    sha256: str
    """Of the file."""
    documents: list[str]
    questions: list[Question]


def read_pool(path: str | Path) -> Pool:
    """A Pool from a SQuAD (1.1 or 2.0) or HotpotQA (distractor setting) JSON file; its content says which.

    Raises DataError for a file that is neither.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        values = json.loads(content)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}): give a SQuAD or HotpotQA file") from None
    kind = kind_of(values)
    if kind is None:
        raise DataError(f"{path} has neither SQuAD's nor HotpotQA's layout: give one of their development files")
    try:
        documents, questions = (_squad if kind == "squad" else _hotpot)(values)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(f"{path} departs from {kind}'s layout ({type(error).__name__}: {error}): check the file") from None
    if not questions:
        raise DataError(f"{path} holds no question that has an answer: check the file")
    return Pool(kind, str(path), hashlib.sha256(content).hexdigest(), documents, questions)


def kind_of(values: Any) -> str | None:
    """squad, hotpotqa, or None for JSON values of another layout."""
    if isinstance(values, dict) and isinstance(values.get("data"), list) and values["data"]:
        first = values["data"][0]
        return "squad" if isinstance(first, dict) and "paragraphs" in first else None
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return "hotpotqa" if {"question", "answer", "context"} <= values[0].keys() else None
    return None


def _squad(values: dict[str, Any]) -> tuple[list[str], list[Question]]:
    articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in values["data"]]
    documents = sorted({text for article in articles for text in article})
    places = {text: place for place, text in enumerate(documents)}
    questions = []
    for article, texts in zip(values["data"], articles, strict=True):
        mine = [places[text] for text in texts]
        for paragraph in article["paragraphs"]:
            gold = places[paragraph["context"]]
            others = tuple(place for place in mine if place != gold)
            for asked in paragraph["qas"]:
                answers = _said(answer["text"] for answer in asked["answers"])
                if not asked.get("is_impossible", False) and answers:
                    questions.append(Question(asked["question"], answers, (gold,), (gold,), others))
    return documents, questions


def _said(answers: Iterable[str]) -> tuple[str, ...]:
    """The answers that say something: every prediction contains an empty one. Raises TypeError for one that is no text."""
    found = tuple(answers)
    for answer in found:
        if not isinstance(answer, str):
            raise TypeError(f"the answer {answer!r} is no text")
    return tuple(answer for answer in found if answer.strip())


def _hotpot(values: list[dict[str, Any]]) -> tuple[list[str], list[Question]]:
    def rendered(entry: dict[str, Any]) -> list[str]:
        return [f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]]

    documents = sorted({text for entry in values for text in rendered(entry)})
    places = {text: place for place, text in enumerate(documents)}
    questions = []
    for entry in values:
        answers = _said([entry["answer"]])
        if not answers:
            continue
        texts = rendered(entry)
        given = tuple(places[text] for text in texts)
        titles = {title for title, _ in entry.get("supporting_facts", [])}
        needed = tuple(place for place, (title, _) in zip(given, entry["context"], strict=True) if title in titles)
        questions.append(Question(entry["question"], answers, needed or given, given, ()))
    return documents, questions

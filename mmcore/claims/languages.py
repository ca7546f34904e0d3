"""Generated languages whose difficulty is set by a few numbers: what a model must do is known exactly.

A language makes episodes, each a document of its own that shares nothing with any other: what it says can only be
known from the context. `Stream` packs episodes into training samples, a pure function of the sample's global index, so
that no episode is ever seen twice and a run on any number of ranks sees the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from mmcore.data.packing import Sample

BEGIN, END, FACT, ASK, IS = range(5)
"""Tokens that every language shares; words follow."""
WORDS = 5


class Episode(NamedTuple):
    """One document: `tokens` int64 [n], and for each token whether it is an answer, that is, whether the context tells it
    and the loss counts it, bool [n]. Where the context tells no single token, `laws` has the chance of each, float64
    [answers, vocabulary]."""

    tokens: np.ndarray
    answers: np.ndarray
    laws: np.ndarray | None = None


class Language(Protocol):
    """Episodes of a given size, drawn from a generator."""

    vocabulary: int
    answer: int
    """Tokens of an answer."""
    grows: str
    """The field that makes its episodes longer."""

    def training(self, random: np.random.Generator) -> Episode:
        """An episode of a random size within the training distribution."""

    def episode(self, random: np.random.Generator, size: int, questions: int) -> Episode:
        """An episode of `size` with `questions` at its end."""


@dataclass(frozen=True)
class Recall:
    """New knowledge: facts first, questions last.

    A fact is `FACT key... value... filler...`, with filler words, which are none of a key's, that mean nothing. Keys of an
    episode differ from one another, but where they have several words no single one tells the fact. A question is
    `ASK key... value...`.
    """

    grows: ClassVar[str] = "most_facts"
    words: int = 64
    key: int = 2
    """Words of a key."""
    value: int = 2
    """Words of a value."""
    most_facts: int = 16
    """In training; every number up to it is as likely."""
    filler: int = 8
    """At most so many words of filler in a fact."""
    filler_words: int = 32
    """Different ones."""
    questions: int = 4
    """In training."""

    @property
    def vocabulary(self) -> int:
        return WORDS + self.words + self.filler_words

    @property
    def answer(self) -> int:
        return self.value

    def training(self, random: np.random.Generator) -> Episode:
        facts = int(random.integers(1, self.most_facts + 1))
        return self.episode(random, facts, min(self.questions, facts))

    def episode(self, random: np.random.Generator, size: int, questions: int) -> Episode:
        """`size` facts, and `questions` about different ones of them."""
        numbers = random.choice(self.words**self.key, size, replace=False)
        keys = numbers[:, None] // self.words ** np.arange(self.key) % self.words + WORDS
        values = random.integers(WORDS, WORDS + self.words, (size, self.value))
        tokens: list[int] = [BEGIN]
        for key, value in zip(keys, values, strict=True):
            filler = random.integers(WORDS + self.words, self.vocabulary, random.integers(0, self.filler + 1))
            tokens += [FACT, *key, *value, *filler]
        answers = [False] * len(tokens)
        for asked in random.choice(size, questions, replace=False):
            tokens += [ASK, *keys[asked], *values[asked]]
            answers += [False] * (1 + self.key) + [True] * self.value
        return Episode(np.array([*tokens, END], dtype=np.int64), np.array([*answers, False]))

    def mean_length(self, size: int) -> float:
        """Tokens of an episode of `size` facts without its questions."""
        return 2 + size * (1 + self.key + self.value + self.filler / 2)


@dataclass(frozen=True)
class Classes:
    """In-context learning: sentences of anonymous classes, each followed by its label.

    A class is a few words that its sentences are likelier to use; both these words and the label are drawn anew in every
    episode. An example is `FACT word... IS label`. A shot is one example of every class, in an order of its own.
    """

    answer: ClassVar[int] = 1
    grows: ClassVar[str] = "shots"
    words: int = 64
    labels: int = 16
    classes: int = 8
    typical: int = 6
    """Words of a class."""
    length: int = 5
    """Words of a sentence."""
    noise: float = 0.3
    """Chance of a word that comes from anywhere instead."""
    shots: int = 5
    """In training."""

    @property
    def vocabulary(self) -> int:
        return WORDS + self.words + self.labels

    def training(self, random: np.random.Generator) -> Episode:
        episode = self.episode(random, self.shots, 0)
        return Episode(episode.tokens, episode.tokens >= WORDS + self.words)

    def episode(self, random: np.random.Generator, size: int, questions: int) -> Episode:
        """`size` shots, and `questions` further examples, whose labels alone are answers."""
        lexicon = np.stack([random.choice(self.words, self.typical, replace=False) for _ in range(self.classes)]) + WORDS
        labels = random.choice(self.labels, self.classes, replace=False) + WORDS + self.words
        asked = random.permutation(np.arange(questions) % self.classes)
        order = np.concatenate([*(random.permutation(self.classes) for _ in range(size)), asked]).astype(int)
        sentences = lexicon[order[:, None], random.integers(0, self.typical, (len(order), self.length))]
        noise = random.random(sentences.shape) < self.noise
        sentences[noise] = random.integers(WORDS, WORDS + self.words, int(noise.sum()))
        rows = np.concatenate([
            np.full((len(order), 1), FACT), sentences, np.full((len(order), 1), IS), labels[order][:, None],
        ], axis=1)  # fmt: skip
        answers = np.zeros(rows.shape, dtype=bool)
        answers[len(order) - questions :, -1] = True
        tokens = np.concatenate([[BEGIN], rows.ravel(), [END]])
        return Episode(tokens.astype(np.int64), np.concatenate([[False], answers.ravel(), [False]]))


@dataclass(frozen=True)
class Automata:
    """In-context language learning (Akyurek et al., arXiv 2401.12973): strings of a random automaton, drawn anew in every
    episode, whose rules have to be found from the strings before.

    An automaton has states, each with a few edges of different symbols to random states, all as likely. A string is `FACT
    symbol...`, a walk from the first state.
    """

    answer: ClassVar[int] = 1
    grows: ClassVar[str] = "strings"
    symbols: int = 8
    states: int = 4
    edges: int = 2
    """From each state."""
    length: int = 10
    """Symbols of a string."""
    strings: int = 12
    """In training."""

    @property
    def vocabulary(self) -> int:
        return WORDS + self.symbols

    def training(self, random: np.random.Generator) -> Episode:
        episode = self.episode(random, self.strings, 0)
        return Episode(episode.tokens, episode.tokens >= WORDS)

    def episode(self, random: np.random.Generator, size: int, questions: int) -> Episode:
        """`size` strings, and the first `questions` symbols of one more, which are the answers."""
        symbol = np.stack([random.choice(self.symbols, self.edges, replace=False) for _ in range(self.states)]) + WORDS
        target = random.integers(0, self.states, (self.states, self.edges))
        tokens, laws = [BEGIN], []
        for number in range(size + (questions > 0)):
            tokens.append(FACT)
            state = 0
            for _ in range(self.length if number < size else questions):
                law = np.zeros(self.vocabulary)
                law[symbol[state]] = 1 / self.edges
                laws.append(law)
                edge = random.integers(0, self.edges)
                tokens.append(int(symbol[state, edge]))
                state = target[state, edge]
        answers = np.zeros(len(tokens) + 1, dtype=bool)
        answers[len(tokens) - questions : len(tokens)] = True
        return Episode(np.array([*tokens, END], dtype=np.int64), answers, np.array(laws[len(laws) - questions :]))


class Stream:
    """Training samples of T + 1 tokens: episodes side by side until one does not fit, then filler that no loss counts."""

    def __init__(self, language: Language, sequence_length: int, seed: int):
        self.language, self.size, self.seed = language, sequence_length + 1, seed

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng([self.seed, index])
        tokens = np.full(self.size, END, dtype=np.int64)
        documents, trained = np.zeros(self.size, dtype=np.int32), np.zeros(self.size, dtype=bool)
        at = number = 0
        while True:
            episode = self.language.training(random)
            end = at + len(episode.tokens)
            if end > self.size:
                documents[at:] = number
                return Sample(tokens, documents, trained)
            tokens[at:end], documents[at:end], trained[at:end] = episode.tokens, number, episode.answers
            at, number = end, number + 1

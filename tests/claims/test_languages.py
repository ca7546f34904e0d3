"""What a generated language says: every question can be answered from its context, and from nothing else."""

import numpy as np
import pytest

from mmcore.claims.languages import ASK, BEGIN, END, FACT, IS, WORDS, Automata, Classes, Recall, Stream

RECALL = Recall(words=20, key=2, value=3, most_facts=9, filler=3, questions=4)
CLASSES = Classes(words=40, labels=12, classes=5, typical=4, length=6, shots=3)


def facts_of(tokens: list[int], language: Recall) -> dict[tuple[int, ...], list[int]]:
    """Key -> value, read off the text by its marks alone."""
    found = {}
    for at, token in enumerate(tokens):
        if token == FACT:
            key = tuple(tokens[at + 1 : at + 1 + language.key])
            assert key not in found
            found[key] = tokens[at + 1 + language.key : at + 1 + language.key + language.value]
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_question_is_answered_by_one_fact(seed):
    random = np.random.default_rng(seed)
    episode = RECALL.episode(random, 9, 4)
    tokens = episode.tokens.tolist()
    assert (tokens[0], tokens[-1], tokens.count(FACT), tokens.count(ASK)) == (BEGIN, END, 9, 4)
    facts = facts_of(tokens, RECALL)
    asked, answers = set(), np.zeros(len(tokens), dtype=bool)
    for at, token in enumerate(tokens):
        if token == ASK:
            key = tuple(tokens[at + 1 : at + 3])
            first = at + 3
            assert tokens[first : first + 3] == facts[key]
            answers[first : first + 3] = True
            asked.add(key)
    assert len(asked) == 4
    assert (answers == episode.answers).all()  # answers, all of them and nothing else


def test_a_key_is_never_filler():
    language = Recall(words=6, key=1, value=1, filler=9, filler_words=3)
    tokens = language.episode(np.random.default_rng(0), 6, 2).tokens
    keys = {key[0] for key in facts_of(tokens.tolist(), language)}
    assert max(keys) < WORDS + 6
    assert tokens.max() < language.vocabulary


def test_training_meets_every_size_up_to_the_greatest():
    random = np.random.default_rng(0)
    sizes = [int((RECALL.training(random).tokens == FACT).sum()) for _ in range(400)]
    assert set(sizes) == set(range(1, 10))


@pytest.mark.parametrize("seed", range(5))
def test_a_class_has_one_label_and_every_shot_every_class(seed):
    episode = CLASSES.episode(np.random.default_rng(seed), 3, 5)
    rows = episode.tokens[1:-1].reshape(-1, 9)
    assert (rows[:, 0] == FACT).all()
    assert (rows[:, 7] == IS).all()
    labels = rows[:, 8].reshape(4, 5)  # three shots and the questions
    assert all(set(shot) == set(labels[0]) for shot in labels)
    assert len(set(labels[0])) == 5
    assert set(labels[0]) <= set(range(WORDS + 40, WORDS + 52))
    assert np.flatnonzero(episode.answers).tolist() == [1 + 9 * row + 8 for row in range(15, 20)]


def test_sentences_of_a_class_are_told_by_their_words():
    """The nearest class by words seen in the shots is right far more often than one in five."""
    random, hits, count = np.random.default_rng(0), 0, 0
    for _ in range(50):
        rows = CLASSES.episode(random, 8, 5).tokens[1:-1].reshape(-1, 9)
        shots, asked = rows[:40], rows[40:]
        seen = {label: np.bincount(shots[shots[:, 8] == label][:, 1:7].ravel(), minlength=60) for label in set(shots[:, 8])}
        for row in asked:
            hits += max(seen, key=lambda label: seen[label][row[1:7]].sum()) == row[8]
            count += 1
    assert hits / count > 0.8


@pytest.mark.parametrize("seed", range(5))
def test_the_strings_of_an_automaton_tell_its_laws(seed):
    """After many strings, the symbols seen after each history of the same state are those of the law, as often."""
    language = Automata(symbols=6, states=3, edges=2, length=8)
    random = np.random.default_rng(seed)
    episode = language.episode(random, 400, 8)
    strings = [s.split() for s in " ".join(map(str, episode.tokens[1:-1])).split(f"{FACT} ")]
    *read, asked = [[int(symbol) for symbol in string] for string in strings[1:]]
    assert (len(read), len(asked), len(episode.laws)) == (400, 8, 8)
    assert episode.tokens[episode.answers].tolist() == asked
    for at in range(4):
        after = [string[at] for string in read if string[:at] == asked[:at]]
        assert len(after) > 10
        law = episode.laws[at]
        assert law.sum() == pytest.approx(1)
        assert law[asked[at]] > 0
        counts = np.bincount(after, minlength=language.vocabulary) / len(after)
        assert set(np.flatnonzero(counts)) == set(np.flatnonzero(law))
        assert abs(counts - law).max() < 4 * 0.5 / len(after) ** 0.5  # four standard deviations of a coin


@pytest.mark.parametrize("language", [RECALL, CLASSES, Automata()], ids=["recall", "classes", "automata"])
def test_a_stream_is_a_function_of_the_index_and_cuts_no_episode(language):
    stream = Stream(language, 200, seed=3)
    sample = stream[7]
    again, other = Stream(language, 200, seed=3)[7], Stream(language, 200, seed=4)[7]
    assert all((a == b).all() for a, b in zip(sample, again, strict=True))
    assert (sample.tokens != other.tokens).any()
    assert (sample.tokens != stream[8].tokens).any()
    assert [part.shape for part in sample] == [(201,)] * 3
    assert sample.trained.any()
    for document in range(sample.documents.max()):  # the last is filler, or an episode that just fits
        part = sample.tokens[sample.documents == document]
        assert (part[0], part[-1]) == (BEGIN, END)
        assert sample.trained[sample.documents == document].any()
    last = sample.tokens[sample.documents == sample.documents.max()]
    assert (last == END).all() or (last[0] == BEGIN and not (last[last.argmin() + 1 :] == BEGIN).any())

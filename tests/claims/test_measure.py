"""Accuracy of models whose answers are known."""

import types

import pytest
import torch

from mmcore.claims.languages import ASK, FACT, Recall, Stream
from mmcore.claims.measure import accuracy, answer_loss, checkpoints_of_a_curve
from tests.helpers.models import tiny

LANGUAGE = Recall(words=20, key=1, value=2, most_facts=6, filler=2)


class Oracle(torch.nn.Module):
    """Looks the answer up, and writes it as a one-hot vector; `share` of the keys it has forgotten."""

    def __init__(self, forgotten=()):
        super().__init__()
        self.model = types.SimpleNamespace(embed_tokens=torch.nn.Embedding(1, 1))
        self.knocked_out, self.forgotten, self.calls = frozenset(), forgotten, []
        self.lm_head = lambda hidden: hidden

    def without(self, memories):
        self.knocked_out = frozenset(memories)
        return self

    def hidden(self, tokens):
        self.calls.append(self.knocked_out)
        out = torch.zeros(*tokens.shape, LANGUAGE.vocabulary)
        for row, text in enumerate(tokens.tolist()):
            facts = {text[at + 1]: text[at + 2 : at + 4] for at, token in enumerate(text) if token == FACT}
            for at, token in enumerate(text):
                if token == ASK and text[at + 1] not in self.forgotten:
                    for n, word in enumerate(facts[text[at + 1]]):
                        if at + 1 + n < len(text):
                            out[row, at + 1 + n, word] = 1
        return out


def test_an_oracle_is_always_right_and_a_mute_never():
    assert accuracy(Oracle(), LANGUAGE, 6, episodes=7, questions=3) == (21, 21)
    assert accuracy(Oracle(range(100)), LANGUAGE, 6, episodes=7, questions=3) == (0, 21)


def test_half_an_answer_is_no_answer():
    class Half(Oracle):
        def hidden(self, tokens):
            out = super().hidden(tokens)
            out[:, 1:] = torch.where((tokens[:, :-1] == ASK)[..., None], out[:, 1:], 0)  # the first word alone
            return out

    assert accuracy(Half(), LANGUAGE, 6, episodes=7, questions=3)[0] == 0


def test_memories_are_removed_for_the_measurement_only():
    oracle = Oracle().without(["short_term"])
    accuracy(oracle, LANGUAGE, 6, episodes=2, questions=1, without=["long_term"])
    assert oracle.calls == [frozenset({"long_term"})]
    assert oracle.knocked_out == frozenset({"short_term"})


def test_the_loss_counts_answers_alone():
    model = tiny(vocab_size=LANGUAGE.vocabulary)
    found = answer_loss(model, LANGUAGE, 50, samples=5)
    nats, count = 0.0, 0
    stream = Stream(LANGUAGE, 50, 1 << 40)
    for index in range(5):
        sample = stream[index]
        with torch.no_grad():
            logs = model(torch.from_numpy(sample.tokens[None, :-1]), torch.from_numpy(sample.documents[None, :-1])).log_softmax(-1)
        for t in range(50):
            if sample.trained[t + 1]:
                nats -= float(logs[0, t, sample.tokens[t + 1]])
                count += 1
    assert found == pytest.approx(nats / count, rel=1e-4)


def test_a_curve_is_looked_at_from_early_on_to_the_end():
    steps = checkpoints_of_a_curve(1000)
    assert (steps[0], steps[-1], len(steps)) == (10, 1000, 12)
    assert checkpoints_of_a_curve(1) == [1]

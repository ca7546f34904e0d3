"""Every token is scored once, from the context that is promised, and the loss is the model's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.evaluation.scoring import pack, score_documents, score_sequence, windows
from tests.evaluation.models import EchoModel, small_model

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda pair: (max(pair), min(pair)))


@given(length=st.integers(0, 200), shape=shapes)
def test_windows_score_each_target_once_with_the_promised_context(length, shape):
    context, stride = shape
    targets = []
    for window in windows(length, context, stride):
        assert len(window) <= context and window.start <= window.scored_from < window.stop
        for target in range(window.scored_from, window.stop):
            targets.append(target)
            read = target - window.start + 1
            assert read == target + 1 or read >= context - stride + 1
    assert targets == list(range(length))


@given(lengths=st.lists(st.integers(0, 90), max_size=12), shape=shapes)
def test_packing_keeps_every_window_whole(lengths, shape):
    context, stride = shape
    pieces = [w for index, length in enumerate(lengths) for w in windows(length, context, stride, index)]
    rows = pack(pieces, context)
    assert all(0 < sum(map(len, row)) <= context for row in rows)
    found = sorted((w for row in rows for w in row), key=lambda window: (window.document, window.start))
    assert found == pieces


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=6), shape=shapes, batch_size=st.integers(1, 4))
def test_each_value_belongs_to_its_token(lengths, shape, batch_size):
    """The echo's value names the token read and the label, so that a value in the wrong place shows."""
    context, stride = shape
    rng = np.random.default_rng(sum(lengths))
    documents = [rng.integers(0, 256, size=length) for length in lengths]
    model = EchoModel()
    losses = score_documents(model, documents, context, stride, batch_size)
    assert sum(int((labels != -100).sum()) for _, _, labels in model.calls) == sum(lengths) - len(lengths)
    for tokens, values in zip(documents, losses, strict=True):
        seen, pairs = np.divmod(values.astype(np.int64), 65_536)
        np.testing.assert_array_equal(pairs, 256 * tokens[:-1] + tokens[1:])
        place = np.arange(1, len(tokens))
        assert ((seen == place) | ((seen >= context - stride + 1) & (seen <= context))).all()


def independent_losses(model, tokens, context, stride):
    """Each target from the logits of its own window, in float64, one window at a time."""
    losses, start, scored = [], 0, 0
    while scored < len(tokens) - 1:
        stop = min(start + context, len(tokens) - 1)
        with torch.no_grad():
            logits = model(torch.tensor(tokens[start:stop])[None])[0].double()
        for target in range(scored, stop):
            row = logits[target - start]
            losses.append(float(torch.logsumexp(row, 0) - row[tokens[target + 1]]))
        start, scored = start + stride, stop
    return losses


@pytest.mark.parametrize("model_type", ["memory_mosaics_v2", "llama"])
@pytest.mark.parametrize("context, stride", [(32, 16), (17, 17), (64, 5)])
def test_loss_equals_an_independent_float64_computation(model_type, context, stride):
    model = small_model(model_type)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 258, size=length) for length in (2, 70, 33, 18, 5, 64)]
    found = score_documents(model, documents, context, stride, batch_size=3)
    expected = [independent_losses(model, tokens.tolist(), context, stride) for tokens in documents]
    for values, truth in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, truth, rtol=2e-5, atol=2e-5)
    perplexity = math.exp(np.concatenate(found).mean(dtype=np.float64))
    assert perplexity == pytest.approx(math.exp(np.mean(np.concatenate(expected))), rel=1e-5)


def test_a_sequence_read_whole_equals_its_logits():
    model = small_model()
    tokens = np.random.default_rng(1).integers(0, 258, size=150)
    truth = independent_losses(model, tokens.tolist(), 200, 200)
    np.testing.assert_allclose(score_sequence(model, tokens), truth, rtol=2e-5, atol=2e-5)


def test_batch_size_does_not_matter():
    model = small_model()
    documents = [np.random.default_rng(n).integers(0, 258, size=20 + 9 * n) for n in range(8)]
    one, many = (score_documents(model, documents, 32, 16, size) for size in (1, 7))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_progress_ends_at_its_total():
    calls = []
    documents = [np.arange(1, 50), np.arange(1, 20)]
    score_documents(EchoModel(), documents, 16, 8, 2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_stride_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="stride"):
        score_documents(EchoModel(), [np.arange(5)], 4, 5, 1)

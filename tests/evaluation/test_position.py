"""Bins by position cover every token once, and sequences are cut as promised."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcore.evaluation.position import bin_edges, by_position, cut_sequences
from tests.evaluation.models import BEGIN, ByteTokenizer


@given(trained=st.integers(1, 5000), longest=st.integers(1, 40_000))
def test_edges_rise_and_hold_the_trained_context(trained, longest):
    edges = bin_edges(trained, longest)
    assert edges == sorted(set(edges)) and edges[-1] == longest
    assert edges[0] >= 4 or edges == [longest]
    multiples = [trained * 2**k for k in range(4)]
    assert all(multiple in edges for multiple in multiples if 4 <= multiple <= longest)
    if longest >= trained:
        assert edges[0] < 8


def test_edges_are_even_on_a_logarithmic_axis():
    assert bin_edges(512, 4096) == [4, 8, 16, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096]


@given(trained=st.integers(1, 60), length=st.integers(1, 200), count=st.integers(1, 4))
def test_bins_recombine_to_the_total(trained, length, count):
    losses = np.random.default_rng(length).random((count, length)).astype(np.float32)
    bins = by_position(losses, trained)
    assert sum(part.count for part in bins) == losses.size
    assert [part.first for part in bins] == [1] + [part.last + 1 for part in bins[:-1]] and bins[-1].last == length
    total = sum(part.loss * part.count for part in bins)
    assert total == pytest.approx(losses.sum(dtype=np.float64), rel=1e-9)


def test_a_bin_by_hand():
    losses = np.array([[1, 2, 3, 4, 5, 6, 7, 8], [3, 2, 1, 0, 1, 2, 3, 4]], dtype=np.float32)
    first, middle, last = by_position(losses, 4)
    assert (first.last, middle.last) == (4, 6)
    assert (last.first, last.last, last.count) == (7, 8, 4)
    assert last.loss == pytest.approx((7 + 8 + 3 + 4) / 4)
    # Two sequences with means 7.5 and 3.5: deviation 4 / sqrt(2), error of the mean 2.
    assert last.standard_error == pytest.approx(2.0)
    assert by_position(losses[:1], 4)[-1].standard_error is None


def cut(texts, length, most=100, begin=BEGIN):
    return cut_sequences(texts, ByteTokenizer().encode_batch, begin, length, most)


def test_long_documents_are_taken_beginnings_first():
    texts = ["a" * 25, "short", "b" * 9 + "c" * 10, "d" * 10]
    found = cut(texts, 10)
    assert not found.concatenated and found.length == 10
    decoded = [bytes(tokens[1:].tolist()).decode() for tokens in found.tokens]
    assert decoded == ["a" * 10, "b" * 9 + "c", "d" * 10, "a" * 10]
    assert all(tokens[0] == BEGIN and len(tokens) == 11 for tokens in found.tokens)
    assert len(cut(texts, 10, most=2).tokens) == 2


def test_short_documents_are_joined_in_order():
    found = cut(["one", "two", "three"], 6)
    assert found.concatenated
    assert [bytes(tokens[1:].tolist()).decode() for tokens in found.tokens] == ["one\n\nt", "wo\n\nth"]


def test_a_text_that_is_too_short_gives_what_there_is():
    found = cut(["one", "two"], 100)
    assert found.concatenated and found.length == 8 and len(found.tokens) == 1
    assert cut([""], 100) is None


def test_no_begin_token():
    found = cut(["a" * 25], 10, begin=None)
    assert found.length == 10 and [len(tokens) for tokens in found.tokens] == [11, 11]

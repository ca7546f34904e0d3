"""Permutations and schedules as properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.data.order import BLOCK, Permutation, Schedule


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_permutation_meets_every_index_once(size, key):
    permutation = Permutation(size, key)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_permutation_depends_on_its_key_and_looks_random():
    size = 4096
    orders = [np.array([Permutation(size, *key)[i] for i in range(size)]) for key in ((0, 0), (0, 1), (1, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).mean() < 0.01
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.05
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
        assert (np.abs(np.diff(order)) == 1).mean() < 0.01


def test_permutation_of_a_huge_range_needs_no_memory():
    permutation = Permutation(10**12 + 39, 7)
    images = {permutation[i] for i in range(10**12 - 100, 10**12)}
    assert len(images) == 100
    assert max(images) < 10**12 + 39
    for wrong in (-1, 10**12 + 39):
        with pytest.raises(IndexError):
            permutation[wrong]


@settings(max_examples=8, deadline=None)
@given(weights=st.lists(st.floats(1e-4, 10), min_size=1, max_size=6))
def test_schedule_keeps_to_the_weights_in_every_stretch(weights):
    schedule = Schedule(weights)
    drawn = [schedule[i] for i in range(BLOCK)]
    counts = np.zeros(len(weights), dtype=np.int64)
    shares = np.array(weights) / sum(weights)
    worst = 0.0
    for index, (source, before) in enumerate(drawn):
        assert before == counts[source]
        counts[source] += 1
        if index % 97 == 0:
            worst = max(worst, float(np.abs(counts - shares * (index + 1)).max()))
    assert worst <= 1 + len(weights)  # never more than a few samples from the exact share
    assert (counts >= 1).all()
    for source, count in enumerate(counts):  # the next block goes on counting
        first = next(i for i, (s, _) in enumerate(drawn) if s == source)
        assert schedule[3 * BLOCK + first] == (source, 3 * int(count))

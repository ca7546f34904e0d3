"""Learning rate and long-term delay are pure functions of the step."""

import math
from collections import Counter

import pytest

from mmcore.config import TrainingConfig
from mmcore.training.schedule import learning_rate, long_term_delay


def config(**values):
    return TrainingConfig(**{"steps": 1000, "learning_rate": 1e-3, "warmup_steps": 100} | values)


def test_warm_up_is_linear_from_zero():
    assert learning_rate(config(), 1) == pytest.approx(1e-5)
    assert learning_rate(config(), 50) == pytest.approx(5e-4)
    assert learning_rate(config(), 100) == pytest.approx(1e-3)


def test_cosine_ends_at_its_share_of_the_peak():
    assert learning_rate(config(), 1000) == pytest.approx(1e-5)
    assert learning_rate(config(final_learning_rate_ratio=0.1), 1000) == pytest.approx(1e-4)
    assert learning_rate(config(), 2000) == pytest.approx(1e-5)
    assert learning_rate(config(), 550) == pytest.approx((1e-3 + 1e-5) / 2)  # half way: the mean of both ends


def test_every_step_of_the_cosine_from_its_definition():
    for step in range(100, 1001, 37):
        expected = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * (step - 100) / 900))
        assert learning_rate(config(), step) == pytest.approx(expected, rel=1e-12)


def test_constant_stays_at_the_peak():
    assert {learning_rate(config(schedule="constant"), step) for step in (100, 500, 1000)} == {1e-3}


def test_no_warm_up_and_a_warm_up_longer_than_the_run():
    assert learning_rate(config(warmup_steps=0), 1) == pytest.approx(1e-3, rel=1e-4)
    assert learning_rate(config(steps=10), 10) == pytest.approx(1e-4)


def test_delay_covers_the_closed_range_evenly():
    draws = Counter(long_term_delay((64, 256), 0, step) for step in range(1, 19_301))
    assert min(draws) == 64 and max(draws) == 256 and len(draws) == 193
    # 100 expected a value; the chi-square of 192 degrees of freedom exceeds 260 once in a thousand
    assert sum((count - 100) ** 2 / 100 for count in draws.values()) < 260


def test_delay_depends_on_seed_and_step_alone():
    assert [long_term_delay((1, 10**6), 3, step) for step in (5, 6, 5)].count(long_term_delay((1, 10**6), 3, 5)) == 2
    assert long_term_delay((1, 10**6), 3, 5) != long_term_delay((1, 10**6), 4, 5)
    assert long_term_delay((7, 7), 0, 1) == 7
    # a frozen draw: a change of the rule would change the resumption of every run there is
    assert [long_term_delay((64, 256), 0, step) for step in (1, 2, 3)] == FIRST_DRAWS


FIRST_DRAWS = [83, 151, 112]

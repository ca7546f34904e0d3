"""The choice of a token against exact probabilities in float64 loops, and where its numbers come from."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.errors import ConfigError, NonFiniteError
from mmcore.generation import sampling as choosing
from mmcore.generation.sampling import Draw, Sampling, probabilities, uniform

INF = math.inf


def exact(logits: list[float], sampling: Sampling) -> list[float]:
    """The distribution by its definition: temperature, then the k best, then the smallest set that reaches p."""
    weights = [math.exp((x - max(logits)) / sampling.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: sampling.top_k]
    total, kept, reached = sum(weights[i] for i in order), [], 0.0
    for i in order:
        if sampling.top_p is not None and kept and reached >= sampling.top_p * total:
            break
        kept.append(i)
        reached += weights[i]
    return [weights[i] / reached if i in kept else 0.0 for i in range(len(logits))]


def choose(logits: torch.Tensor, sampling: Sampling, uniforms: list[float]) -> list[int]:
    return Draw(logits, sampling, uniforms).ids()


def draw(logits: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """How often each token comes in `count` draws, all in one batch of equal rows."""
    uniforms = [uniform(sampling.seed, i) for i in range(count)]
    ids = choose(logits.expand(count, -1), sampling, uniforms)
    return torch.bincount(torch.tensor(ids), minlength=logits.shape[-1])


@pytest.fixture(params=[False, True], ids=["", "blind"])
def blind(request, monkeypatch):
    """Whether a draw asks nothing back until its ids are wanted, as on a GPU."""
    monkeypatch.setattr(choosing, "ASYNCHRONOUS", ("cpu",) if request.param else ())
    return request.param


def test_greedy_takes_the_best_and_of_equals_the_lowest(blind):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-INF, -INF, -2.0, -INF]])
    assert choose(logits, Sampling(), [0.0] * 3) == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type(dtype):
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=dtype)
    assert choose(logits, Sampling(), [0.0]) == [1]
    assert choose(logits, Sampling(1.0, top_k=2, top_p=0.9), [0.999]) == [2]


@settings(max_examples=80, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8) | st.just(-INF), min_size=1, max_size=12).filter(lambda x: max(x) > -INF),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_probabilities_follow_the_definition(logits, temperature, top_k, top_p):
    if len(set(logits)) < len(logits):  # which of equals is kept at an edge is free
        return
    sampling = Sampling(temperature, top_k, top_p)
    found = probabilities(torch.tensor([logits], dtype=torch.float64), sampling)[0]
    expected = torch.tensor(exact(logits, sampling), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sampling", [
    Sampling(1.0), Sampling(0.6, seed=3), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.8), Sampling(0.9, 6, 0.7),
], ids=str)
def test_draws_have_the_exact_frequencies(sampling):
    """Pearson's chi-square over 20,000 draws; the bound is exceeded by chance once in about 10^6 trials."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.5
    expected = torch.tensor(exact(logits[0].tolist(), sampling)) * 20_000
    counts = draw(logits, sampling, 20_000)
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    statistic = float(((counts - expected)[live] ** 2 / expected[live]).sum())
    freedom = int(live.sum()) - 1
    # Wilson and Hilferty: the cube root of chi-square over its degrees of freedom is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4.9


@pytest.mark.parametrize("top_p", [pytest.param(p, marks=() if p == 0.9 else pytest.mark.slow) for p in (1e-9, 0.3, 0.9, 0.9999, 1.0)])
def test_top_p_of_a_large_vocabulary_equals_its_definition(top_p):
    """Of many tokens only the best are sorted where they hold enough; flat logits need all of them."""
    for spread in (0.01, 3.0):
        logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * spread
        sampling = Sampling(1.0, top_p=top_p)
        expected = torch.tensor([exact(logits[0].tolist(), sampling)], dtype=torch.float64)
        torch.testing.assert_close(probabilities(logits, sampling), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_chance_find_a_token_that_can_come(u, blind):
    logits = torch.tensor([[-INF, 1.0, 0.0, -INF]])
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=9), Sampling(1.0, top_p=0.999), Sampling(1e-6), Sampling(1e6)):
        assert choose(logits, sampling, [u])[0] in (1, 2)


def test_looking_further_changes_no_draw(blind, monkeypatch):
    logits = torch.randn(6, 400, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.1], [1], [2], [4], [8], [30]])
    uniforms, settings = [uniform(0, i) for i in range(6)], Sampling(1.0, top_p=0.9)
    monkeypatch.setattr(choosing, "_FIRST_LOOKS", ())
    whole = choose(logits, settings, uniforms)
    for looks in ((1, 2, 3), (8, 64), (150,)):
        monkeypatch.setattr(choosing, "_FIRST_LOOKS", looks)
        draw = Draw(logits, settings, uniforms)
        assert bool((draw.tokens == choosing._FURTHER).any()) == blind  # of the flattest row at least
        assert draw.ids() == draw.tokens.tolist() == whole


def test_a_row_that_looks_further_leaves_the_others_theirs(monkeypatch):
    """Ties beyond what is asked for are cut another way by another look; the neighbours' rows must not show."""
    flat, peaked = torch.zeros(1, 500), torch.full((1, 500), -30.0)
    peaked[:, 100:104] = 1.0
    monkeypatch.setattr(choosing, "ASYNCHRONOUS", ("cpu",))
    monkeypatch.setattr(choosing, "_FIRST_LOOKS", (3, 20))
    for u in (0.1, 0.4, 0.6, 0.95):
        alone = choose(peaked, Sampling(1.0, top_p=0.9), [u])
        both = choose(torch.cat([flat, peaked]), Sampling(1.0, top_p=0.9), [0.5, u])
        assert both[1:] == alone and alone[0] in range(100, 104)


@pytest.mark.parametrize("size", [2048, 3 * 256, 192, 1000])
def test_logits_in_parts_equal_whole_rows(monkeypatch, size):
    """Sizes of several parts, and of one; for the greedy choice ties, across parts and within one."""
    random = torch.Generator().manual_seed(size)
    logits = torch.randn(5, size, generator=random) * 3
    logits[3, 7:] = -INF
    tied, uniforms = logits.round(), [uniform(1, i) for i in range(5)]
    for way in (Sampling(), Sampling(1.0), Sampling(0.5, top_p=0.7), Sampling(0.1, 9)):
        given = logits if way.temperature else tied
        monkeypatch.setattr(choosing, "ASYNCHRONOUS", ())
        whole = choose(given, way, uniforms)
        monkeypatch.setattr(choosing, "ASYNCHRONOUS", ("cpu",))
        assert choosing._parts(given).shape[1] == {2048: 2, 768: 3, 192: 3, 1000: 1}[size]
        assert choose(given, way, uniforms) == whole


def test_tiny_top_p_and_one_best_are_greedy():
    logits = torch.tensor([[0.0, 3.0, 2.9]])
    cold = [Sampling(temperature, *limits) for temperature in (1e-8, 1e-40, 1e-46, 5e-324)
            for limits in ((), (2,), (None, 0.9))]  # fmt: skip
    for sampling in (Sampling(1.0, top_p=1e-12), Sampling(1.0, top_k=1), *cold):
        assert choose(logits, sampling, [0.99]) == [1], sampling


def test_numbers_of_numpy_are_numbers():
    given = Sampling(np.float32(0.5), np.int64(3), np.float64(0.9), np.uint64(2**64 - 1))
    assert given == Sampling(0.5, 3, 0.9, 2**64 - 1) and json.dumps(dataclasses.asdict(given))


def test_rows_are_drawn_apart(blind):
    logits = torch.randn(3, 10)
    sampling, uniforms = Sampling(1.0, 7, 0.9), [0.1, 0.5, 0.9]
    alone = [choose(logits[i : i + 1], sampling, uniforms[i : i + 1])[0] for i in range(3)]
    assert choose(logits, sampling, uniforms) == alone


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [INF, 0.0], [-INF, -INF]])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, 1), Sampling(1.0, None, 0.5)], ids=str)
def test_logits_that_are_not_finite_are_refused(bad, sampling, blind):
    with pytest.raises(NonFiniteError, match="not finite"):
        choose(torch.tensor([[0.0, 1.0], bad]), sampling, [0.5, 0.5])


@pytest.mark.parametrize("values, message", [
    ({"temperature": -0.1}, "temperature is -0.1: it must be a number, 0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_k": 0}, "top_k is 0: it must be a whole number of at least 1"),
    ({"top_k": 1.5}, "top_k is 1.5"),
    ({"top_p": 0.0}, "top_p is 0.0: it must lie above 0"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"seed": -1}, "seed is -1: it must be a whole number"),
    ({"seed": True}, "seed is True"),
])
def test_settings_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError, match="temperature .*; top_k .*; top_p"):
        Sampling(-1, 0, 2)


def test_uniform_is_uniform_and_depends_on_both_numbers():
    values = torch.tensor([uniform(7, i) for i in range(20_000)], dtype=torch.float64)
    assert 0 <= values.min() and values.max() < 1
    ordered = values.sort().values
    distance = (ordered - torch.linspace(0, 1, len(ordered), dtype=torch.float64)).abs().max()
    assert distance < 1.95 / math.sqrt(len(ordered))  # Kolmogorov and Smirnov at 0.001
    seeds = torch.tensor([uniform(i, 0) for i in range(20_000)], dtype=torch.float64)
    for row in (values, seeds):
        assert abs(torch.corrcoef(torch.stack([row[:-1], row[1:]]))[0, 1]) < 0.03
    assert len({uniform(s, i) for s in range(50) for i in range(50)}) == 2500


def test_the_first_draws_of_a_seed_never_change():
    """Written down: a saved conversation must go on with the same words in a later version."""
    assert [round(uniform(0, i), 12) for i in range(3)] == [0.701212109522, 0.387124140976, 0.656413707073]

"""What a weight is drawn as depends on seed, name and row alone."""

import math

import torch

from mmcore.model.layers import DRAWN_ROWS, draw_normal, draw_uniform, drawing_rows


def drawn(rows, columns=7, name="w", seed=0, sigma=0.5):
    weight = torch.full((rows, columns), math.nan)
    draw_normal(name, weight, sigma, seed)
    return weight


def test_any_rows_are_the_rows_of_the_whole():
    rows = 3 * DRAWN_ROWS + 5
    whole = drawn(rows)
    for first, last in ((0, rows), (0, 1), (DRAWN_ROWS - 1, DRAWN_ROWS + 1), (70, 70), (rows - 1, rows), (rows, rows), (10, 180)):
        held = torch.full((last - first, 7), math.nan)
        with drawing_rows(lambda weight, held=held, first=first: (held, first)):
            draw_normal("w", torch.empty(rows, 7, device="meta"), 0.5, 0)
        assert torch.equal(held, whole[first:last]), (first, last)
    assert torch.equal(drawn(rows), whole)


def test_names_seeds_and_blocks_differ():
    whole = drawn(2 * DRAWN_ROWS)
    assert not torch.equal(whole[:DRAWN_ROWS], whole[DRAWN_ROWS:])
    assert not torch.equal(whole, drawn(2 * DRAWN_ROWS, name="v"))
    assert not torch.equal(whole, drawn(2 * DRAWN_ROWS, seed=1))


def test_the_distribution_is_table_6_s():
    weight = drawn(40 * DRAWN_ROWS, 100)
    assert weight.abs().max() <= 1.5  # three sigma
    assert abs(float(weight.mean())) < 0.005
    clipped = 0.5 * 0.98658  # the deviation of a normal cut off at three of its own
    assert abs(float(weight.std()) / clipped - 1) < 0.005
    mix = torch.empty(10_000)
    draw_uniform("mix", mix, 0)
    assert 0 <= float(mix.min()) and float(mix.max()) < 1 and abs(float(mix.mean()) - 0.5) < 0.02
    assert abs(float(mix.var()) * 12 - 1) < 0.05

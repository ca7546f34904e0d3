"""The order in which samples are drawn: pure functions of a seed and a global sample index.

Nothing is stored that grows with the data, so any index of any epoch can be asked for at once, and a resumed run
of any world size sees the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6
BLOCK = 1 << 16
"""Samples in one block of a weighted schedule: a source's share is right to 1/65,536."""


def mix(value: int) -> int:
    """64 well-mixed bits from 64 (the finalizer of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A pseudo-random permutation of range(size) that computes one image at a time.

    A Feistel network on the smallest 4**h >= size, walked on until the image lies inside (fewer than four steps on
    average).
    """

    def __init__(self, size: int, *key: int):
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        state = 0
        for part in key:
            state = mix(state ^ (part & _MASK))
        self._round_keys = [mix(state + number) for number in range(_ROUNDS)]

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        while True:
            index = self._encrypt(index)
            if index < self.size:
                return index

    def _encrypt(self, value: int) -> int:
        half, mask = self._half, (1 << self._half) - 1
        left, right = value >> half, value & mask
        for key in self._round_keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return left << half | right


class Schedule:
    """Which of several weighted sources a sample comes from, and how many samples that source gave before.

    Blocks of BLOCK samples repeat; within one, each source has its share of places, spread evenly (a place for
    source s at every BLOCK / share_s), so that any stretch of samples is near the weights. Every source has at
    least one place in a block.
    """

    def __init__(self, weights: Sequence[float]):
        shares = _shares(weights)
        places = np.concatenate([(np.arange(share) + 0.5) / share for share in shares])
        sources = np.repeat(np.arange(len(shares)), shares)
        order = np.argsort(places, kind="stable")
        self._source = sources[order].astype(np.int32)
        self._before = np.concatenate([np.arange(share) for share in shares])[order].astype(np.int64)
        self._shares = shares

    def __getitem__(self, index: int) -> tuple[int, int]:
        """(source, samples of that source before `index`)."""
        block, place = divmod(index, BLOCK)
        source = int(self._source[place])
        return source, block * self._shares[source] + int(self._before[place])


def _shares(weights: Sequence[float]) -> list[int]:
    """Places in a block for each weight: at least one, BLOCK in all, largest remainders rounded up."""
    total = sum(weights)
    exact = [weight / total * BLOCK for weight in weights]
    shares = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda s: (shares[s] - exact[s], s))
    for step in range(BLOCK - sum(shares)):
        shares[by_remainder[step % len(shares)]] += 1
    while sum(shares) > BLOCK:  # many sources of tiny weight were lifted to one place
        shares[shares.index(max(shares))] -= 1
    return shares

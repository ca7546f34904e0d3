"""How sure a score is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

LEVEL = 0.95


def wilson(hits: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a proportion, hits out of count (Wilson, 1927): sound near 0 and 1 and for few items.

    `hits` may be a sum of fractions, for which the interval is somewhat too wide.
    """
    if count < 1 or not 0 <= hits <= count + 1e-9:
        raise ValueError(f"{hits} of {count} is no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def bootstrap(rows: Sequence[Sequence[float]], level: float = LEVEL, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean of rows [forms][items] over both, where items are drawn anew with replacement (the same
    items for every form): percentiles of `draws` resamples (Efron, 1979)."""
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"there is nothing to draw from in a table of shape {table.shape}")
    items = table.mean(axis=0)
    generator = np.random.default_rng(seed)
    means = [items[generator.integers(0, len(items), len(items))].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

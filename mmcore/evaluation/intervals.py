"""How sure a score is."""

from __future__ import annotations

import math
from statistics import NormalDist

LEVEL = 0.95


def wilson(hits: float, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a proportion, hits out of count (Wilson, 1927): sound near 0 and 1 and for few items.

    `hits` may be a sum of numbers from 0 to 1, whose variance is at most that of a coin: the interval is then rather
    too wide than too narrow.
    """
    if count < 1 or not 0 <= hits <= count + 1e-9:
        raise ValueError(f"{hits} of {count} is no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = (middle - spread) / scale if hits > 0 else 0.0  # exactly: the difference of equals leaves a rest
    high = (middle + spread) / scale if hits < count else 1.0
    return max(0.0, low), min(1.0, high)

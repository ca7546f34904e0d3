"""Choosing the next token: pure functions of logits, settings and a number in [0, 1).

The only source of chance is `uniform(seed, position)`, a pure function. A conversation that was saved and
loaded, or that is read in other chunks, therefore goes on with the very tokens it would have had; no generator
state has to be kept, and the CPU and a GPU draw the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcore.errors import ConfigError, NonFiniteError

_MASK = (1 << 64) - 1
_FIRST_LOOKS = (64, 1024)
"""Tokens sorted at first under top_p alone. Sorting all of Llama 3's 128,256 logits takes 11 ms on one core, the
best 1,024 take 0.8 ms, and these few nearly always hold the mass that is asked for."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Raises ConfigError for values out of range."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most likely token (of equals the lowest id)."""
    top_k: int | None = None
    """Only the so many most likely tokens can be drawn; none: all."""
    top_p: float | None = None
    """Only the smallest set of most likely tokens whose probabilities reach this sum can be drawn; none: all."""
    seed: int = 0
    """Another seed, other words."""

    def __post_init__(self) -> None:
        problems = []
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            problems.append(f"temperature is {self.temperature!r}: it must be a number, 0 (greedy) or above")
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            problems.append(f"top_k is {self.top_k!r}: it must be a whole number of at least 1, or none for all")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            problems.append(f"top_p is {self.top_p!r}: it must lie above 0 and at most at 1, or be none for all")
        if not _is_whole(self.seed) or not 0 <= self.seed <= _MASK:
            problems.append(f"seed is {self.seed!r}: it must be a whole number from 0 to 2^64 - 1")
        if problems:
            raise ConfigError("; ".join(problems))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone.

    SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): the stream that
    starts at the scrambled seed, read at `position`; 53 bits of it fill a double.
    """
    mixed = _scramble(_scramble(seed) + (position + 1) * 0x9E3779B97F4A7C15)
    return (mixed >> 11) * 2.0**-53


def choose(logits: Tensor, sampling: Sampling, uniforms: list[float]) -> list[int]:
    """The next token of each row.

    logits [B, V] of any float type; -inf marks tokens that cannot come; uniforms: B numbers in [0, 1), unused
    when the temperature is 0. The order of the limits is temperature, top_k, top_p, as elsewhere in the field.
    Raises NonFiniteError where a row holds NaN, +inf, or nothing but -inf.
    """
    if sampling.temperature == 0:
        _require_finite(logits.amax(-1))
        return logits.argmax(-1).tolist()
    weights, ids = _candidates(logits, sampling)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # u is at most 1 - 2^-53, so that u * total rounds to less than the total: the token found always has weight.
    u = torch.tensor(uniforms, dtype=torch.float64, device=logits.device).unsqueeze(-1)
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return (drawn if ids is None else ids.gather(-1, drawn)).squeeze(-1).tolist()


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [B, V] fp64 that `choose` draws from, to look at and to test against."""
    if sampling.temperature == 0:
        _require_finite(logits.amax(-1))
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    weights, ids = _candidates(logits, sampling)
    weights = weights.double()
    if ids is not None:
        weights = torch.zeros_like(logits, dtype=torch.float64).scatter(-1, ids, weights)
    return weights / weights.sum(-1, keepdim=True)


def _candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Weights [B, N] of the tokens that can come, proportional to their probabilities, at least fp32, and their
    ids [B, N] (None: the N = V columns are the ids). Tokens that a limit excludes have weight 0."""
    size = logits.shape[-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    best = logits.amax(-1, keepdim=True)
    _require_finite(best)

    def weigh(values: Tensor) -> Tensor:
        return (values - best).div_(sampling.temperature).exp_()

    keep = size if sampling.top_k is None else min(sampling.top_k, size)
    if sampling.top_p is None or sampling.top_p == 1:
        if keep == size:
            return weigh(logits), None
        values, ids = logits.topk(keep)
        return weigh(values), ids
    if keep < size:  # the probabilities are taken among the k
        values, ids = logits.topk(keep)
        weights = weigh(values)
        return _nucleus(weights, sampling.top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)), ids
    mass = sampling.top_p * weigh(logits).sum(-1, keepdim=True, dtype=torch.float64)
    for look in _FIRST_LOOKS:
        if 2 * look < size:
            values, ids = logits.topk(look)
            weights = weigh(values)
            if bool((weights.sum(-1, keepdim=True, dtype=torch.float64) >= mass).all()):
                return _nucleus(weights, mass), ids
    values, ids = logits.sort(descending=True, stable=True)
    return _nucleus(weigh(values), mass), ids


def _nucleus(weights: Tensor, mass: Tensor) -> Tensor:
    """`weights` [B, N], sorted downwards, with 0 for those that come after their sum has reached `mass` [B, 1]."""
    before = weights.cumsum(-1, dtype=torch.float64) - weights
    before[:, 0] = -1  # the most likely token always stays, however small top_p
    return torch.where(before < mass, weights, 0.0)


def _scramble(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _require_finite(best: Tensor) -> None:
    if not all(map(math.isfinite, best.flatten().tolist())):
        raise NonFiniteError(
            "the model's logits are not finite: the weights are damaged, or too large for this dtype (try float32)"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

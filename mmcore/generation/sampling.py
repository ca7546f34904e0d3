"""Choosing the next token: pure functions of logits, settings and a number in [0, 1).

The only source of chance is `uniform(seed, position)`, a pure function. A conversation that was saved and
loaded, or that is read in other chunks, therefore goes on with the very tokens it would have had; no generator
state has to be kept, and the CPU and a GPU draw the same numbers.
"""

from __future__ import annotations

import itertools
import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcore.errors import ConfigError, NonFiniteError

_MASK = (1 << 64) - 1
_FIRST_LOOKS = (64, 1024)
"""Tokens sorted at first under top_p alone. Sorting all of Llama 3's 128,256 logits takes 11 ms on one core, the
best 1,024 take 0.8 ms, and these few nearly always hold the mass that is asked for. On a GPU, where an answer costs more
than a longer look, the last alone."""
ASYNCHRONOUS = ("cuda",)
"""Devices that work while the host does other things: a draw asks them once, and sessions read ahead there."""
_PART = 1024  # logits of a part, or what divides both it and all of them, if that is a sixteenth of it at least
_NOT_FINITE, _FURTHER = -1, -2
_COLDEST = torch.finfo(torch.float32).tiny
"""Temperatures below it would be 0 in fp32, and 0 / 0 the best token's weight; at it all others have none."""
_DAMAGED = "the model's logits are not finite: the weights are damaged, or too large for this dtype (try float32)"


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
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            problems.append(f"top_k is {self.top_k!r}: it must be a whole number of at least 1, or none for all")
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            problems.append(f"top_p is {self.top_p!r}: it must lie above 0 and at most at 1, or be none for all")
        if not is_whole(self.seed) or not 0 <= self.seed <= _MASK:
            problems.append(f"seed is {self.seed!r}: it must be a whole number from 0 to 2^64 - 1")
        if problems:
            raise ConfigError("; ".join(problems))
        for name, kind in (("temperature", float), ("top_k", int), ("top_p", float), ("seed", int)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))  # NumPy's numbers count as others do, but overflow


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone.

    SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014): the stream that
    starts at the scrambled seed, read at `position`; 53 bits of it fill a double.
    """
    mixed = _scramble(_scramble(seed) + (position + 1) * 0x9E3779B97F4A7C15)
    return (mixed >> 11) * 2.0**-53


class Draw:
    """The next token of each row, drawn where the logits are. On a GPU nothing waits for it until `ids` does.

    logits [B, V] of any float type; -inf marks tokens that cannot come; uniforms: B numbers in [0, 1), unused
    when the temperature is 0. The order of the limits is temperature, top_k, top_p, as elsewhere in the field.
    Raises NonFiniteError, at the latest in `ids`, where a row's logits hold NaN, +inf, or nothing but -inf.
    """

    def __init__(self, logits: Tensor, sampling: Sampling, uniforms: list[float]) -> None:
        self._given = logits, sampling, uniforms
        self._drawn: torch.cuda.Event | None = None
        blind = logits.device.type in ASYNCHRONOUS
        self.tokens = _draw(*self._given, _FIRST_LOOKS[-1:] if blind else _FIRST_LOOKS, blind)
        """int64 [B], on the logits' device; right as soon as `ids` has been asked for."""
        self.again = False
        """Whether `ids` had to draw some of them a second time."""
        self._here = self.tokens.to("cpu", non_blocking=True) if blind else self.tokens
        if logits.is_cuda:
            self._drawn = torch.cuda.Event(enable_timing=True)
            self._drawn.record(torch.cuda.current_stream(logits.device))

    def ids(self) -> list[int]:
        """The ids; waits for them."""
        if self._drawn is not None:
            self._drawn.synchronize()
        ids = self._here.tolist()
        if _NOT_FINITE in ids:
            raise NonFiniteError(_DAMAGED)
        if _FURTHER in ids:
            self.again = True
            further = _draw(*self._given, (), blind=False)
            self.tokens = self._here = torch.where(self.tokens == _FURTHER, further, self.tokens)
            ids = self.tokens.tolist()
        return ids

    def unseen(self) -> Tensor:
        """`tokens` before they are known, for a model to read: 0 where a mark stands, which is no id."""
        return self.tokens.clamp(min=0)

    def device_seconds(self, begun: torch.cuda.Event | None) -> float:
        """Seconds of the GPU from an event until these ids were there; 0 without one."""
        return begun.elapsed_time(self._drawn) / 1e3 if begun is not None and self._drawn is not None else 0.0


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [B, V] fp64 that `Draw` draws from, to look at and to test against."""
    if sampling.temperature == 0:
        best, ids = _greatest(logits)
        _require_finite(best)
        return torch.nn.functional.one_hot(ids, logits.shape[-1]).double()
    best = logits.amax(-1, keepdim=True)
    _require_finite(best)
    weights, ids, _ = _candidates(logits, best, sampling, _FIRST_LOOKS, blind=False)
    weights = weights.double()
    if ids is not None:
        weights = torch.zeros_like(logits, dtype=torch.float64).scatter(-1, ids, weights)
    return weights / weights.sum(-1, keepdim=True)


def _draw(logits: Tensor, sampling: Sampling, uniforms: list[float], looks: tuple[int, ...], blind: bool) -> Tensor:
    """int64 [B]: ids; `looks` as in `_candidates`. `blind` asks nothing back, and marks rows that are not finite or have to
    be looked at further: each answer would keep a GPU idle for some 60 us of a step of 2 ms."""
    if sampling.temperature == 0:
        best, ids = _greatest(logits)
        if blind:
            return torch.where(best.isfinite(), ids, _NOT_FINITE)
        _require_finite(best)
        return ids
    best = _parts(logits).amax(-1).amax(-1, keepdim=True) if blind else logits.amax(-1, keepdim=True)
    if not blind:
        _require_finite(best)
    weights, ids, further = _candidates(logits, best, sampling, looks, blind)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # u is at most 1 - 2^-53, so that u * total rounds to less than the total: the token found always has weight.
    u = torch.tensor(uniforms, dtype=torch.float64, pin_memory=logits.is_cuda).to(logits.device, non_blocking=True)
    drawn = torch.searchsorted(cumulative, u.unsqueeze(-1) * cumulative[:, -1:], right=True)
    if blind:
        drawn.clamp_(max=cumulative.shape[-1] - 1)  # past the end where sums are not finite
    drawn = drawn if ids is None else ids.gather(-1, drawn)
    if blind:
        drawn = drawn if further is None else torch.where(further, _FURTHER, drawn)
        drawn = torch.where(best.isfinite(), drawn, _NOT_FINITE)
    return drawn.squeeze(-1)


def _parts(x: Tensor) -> Tensor:
    """x [B, V] as [B, N, V / N]: sums and maxima of a few long rows are found by few of a GPU's multiprocessors, those of
    parts by all (128,256 logits of one row: 0.1 ms of a step of 2). On a CPU one part."""
    size = x.shape[-1]
    part = math.gcd(size, _PART)
    return x.unflatten(-1, (size // part, part) if x.device.type in ASYNCHRONOUS and part >= _PART // 16 else (1, size))


def _greatest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(the maximum, its lowest index) of each row, [B] each; NaN is the greatest of all."""
    if logits.device.type not in ASYNCHRONOUS:  # a view more costs 3 us of a token there
        return logits.max(-1)
    parts = _parts(logits)
    best, at = parts.max(-1)
    best, which = best.max(-1, keepdim=True)
    return best.squeeze(-1), (which * parts.shape[-1] + at.gather(-1, which)).squeeze(-1)


def _candidates(
    logits: Tensor, best: Tensor, sampling: Sampling, looks: tuple[int, ...], blind: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of logits [B, V] with the maxima `best` [B, 1]: weights [B, N] of the tokens that can come, proportional to their
    probabilities, at least fp32; their ids [B, N] (None: the N = V columns are the ids); and, where `blind`, which rows
    [B, 1] need more than was looked at. Tokens that a limit excludes have weight 0. Under top_p alone so many of the most
    likely tokens as `looks` says are looked at, one number after the other until they suffice, and then all."""
    size = logits.shape[-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()

    def weigh(values: Tensor) -> Tensor:
        return (values - best).div_(max(sampling.temperature, _COLDEST)).exp_()

    keep = size if sampling.top_k is None else min(sampling.top_k, size)
    if sampling.top_p is None or sampling.top_p == 1:
        if keep == size:
            return weigh(logits), None, None
        values, ids = logits.topk(keep)
        return weigh(values), ids, None
    if keep < size:  # the probabilities are taken among the k
        values, ids = logits.topk(keep)
        weights = weigh(values)
        return _nucleus(weights, sampling.top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)), ids, None
    mass = sampling.top_p * _parts(weigh(logits)).sum(-1, dtype=torch.float64).sum(-1, keepdim=True)
    for look in looks:
        if 2 * look < size:
            values, ids = logits.topk(look)
            weights = weigh(values)
            short = weights.sum(-1, keepdim=True, dtype=torch.float64) < mass
            if blind or not bool(short.any()):
                return _nucleus(weights, mass), ids, short
    values, ids = logits.sort(descending=True, stable=True)
    return _nucleus(weigh(values), mass), ids, None


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
    values = best.tolist()
    if not all(map(math.isfinite, values if best.ndim == 1 else itertools.chain(*values))):
        raise NonFiniteError(_DAMAGED)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether a value is an integer, Python's or NumPy's, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)

"""config.json's rope_scaling: which scalings of rotary positions there are, and what each needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""rope_type -> the numbers that it needs."""


def rope_type(scaling: Mapping[str, Any]) -> Any:
    """What kind a scaling is; older files call it `type`, and one that does not say is none."""
    return scaling.get("rope_type", scaling.get("type", "default"))


def scaling_problem(scaling: Mapping[str, Any]) -> str | None:
    """What is wrong with a scaling, which is said of `rope_scaling`; None where it can be used."""
    kind = rope_type(scaling)
    if kind == "default":
        told = [key for key in scaling if key not in ("rope_type", "type", "rope_theta")]
        return f"rope_scaling has {told[0]} and no rope_type that uses it: choose linear or llama3" if told else None
    if not isinstance(kind, str) or kind not in NUMBERS:
        return f"rope_scaling has rope_type {kind!r:.100}, and only linear and llama3 are known"
    numbers = {key: scaling.get(key) for key in NUMBERS[kind]}
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < 1e12:
            return f"rope_scaling.{key} is {number!r:.100} and must be a positive number"
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        return "rope_scaling.low_freq_factor must be below high_freq_factor"
    return None

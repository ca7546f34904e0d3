"""What depends on the step alone: the learning rate and the long-term delay.

Pure functions of the step (and the seed), so that a resumed run, or another number of ranks, draws exactly
what the unbroken run would have drawn: nothing here has a state that could be lost.
"""

from __future__ import annotations

import hashlib
import math

from mmcore.config import TrainingConfig


def learning_rate(training: TrainingConfig, step: int, total_steps: int | None = None) -> float:
    """The learning rate of update number `step`, counted from 1.

    Linear from 0 to the peak over `warmup_steps` updates, then a cosine that reaches
    `final_learning_rate_ratio` times the peak at the last step, or the peak for good where the schedule is
    constant. Past the last step the cosine stays at its end.
    """
    total = training.total_steps if total_steps is None else total_steps
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if training.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    floor = training.final_learning_rate_ratio
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def long_term_delay(delay_range: tuple[int, int], seed: int, step: int) -> int:
    """The delay m of update number `step`: uniform over the integers low .. high, both included.

    A hash of seed and step, not a generator: the same on every rank and in every layer, and a resumed run
    needs no state to draw it again. The bias of scaling 64 bits is below 2^-56 for ranges up to 256.
    """
    low, high = delay_range
    digest = hashlib.blake2b(f"long-term delay {seed} {step}".encode(), digest_size=8).digest()
    return low + (int.from_bytes(digest, "little") * (high - low + 1) >> 64)

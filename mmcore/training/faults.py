"""What a run does about a step that went wrong: stop, skip it, or go back; and what it must remember of that.

All decisions rest on numbers that were summed over the ranks, and so are the same on each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmcore.config import SpikeConfig, TrainingConfig
from mmcore.distributed.mesh import World
from mmcore.distributed.messages import Messages
from mmcore.errors import NonFiniteError, SpikeError
from mmcore.training.metrics import Smoothed
from mmcore.training.step import StepResult, what_is_not_finite

_STILL = 0.01
"""Standard deviation, in nats, below which the losses count as still: a deviation of nothing is no spike."""


class SpikeWatch:
    """Whether a loss lies too far above those before it.

    The mean is the smoothed loss that the metrics show (decay 0.95), the deviation that of the losses from it.
    """

    def __init__(self, config: SpikeConfig | None):
        self.config = config
        self.seen = 0
        self._mean, self._square = Smoothed(), Smoothed()

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is one; it is not taken in."""
        if self.config is None or self.seen < self.config.after_steps:
            return False
        return loss - self._mean.value > self.threshold()

    def threshold(self) -> float:
        """Nats above the mean from which on a loss is a spike."""
        if self.config.nats is not None:
            return self.config.nats
        return self.config.deviations * max(_STILL, math.sqrt(self._square.value))

    def take_in(self, loss: float) -> None:
        """A step was made with this loss."""
        if self.seen:
            self._square.update((loss - self._mean.value) ** 2)
        self._mean.update(loss)
        self.seen += 1

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "mean": self._mean.state(), "square": self._square.state()}

    def load(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self._mean.load(state["mean"])
        self._square.load(state["square"])


@dataclass
class _Counts:
    skipped_steps: int = 0
    in_a_row: int = 0
    rollbacks: int = 0


class Faults:
    """What a run has skipped and gone back from. Its state lies in trainer.json, so that a resumed run skips the same."""

    def __init__(self, training: TrainingConfig, world: World):
        self._training, self._world = training, world
        self.spikes = SpikeWatch(training.spike_rollback)
        self.counts = _Counts()
        self.left_out: list[tuple[int, int]] = []
        """Ranges of global sample numbers, [first, stop), that no update of the present weights has seen."""

    def step_done(self, loss: float | None) -> None:
        """An update was made; None where no label was trained."""
        self.counts.in_a_row = 0
        if loss is not None:
            self.spikes.take_in(loss)

    def skip(self, step: int, reason: str, samples: range, checkpoint: object, learning_rate: float) -> None:
        """Count a step whose loss or gradient is not finite, or raise NonFiniteError as the recipe has it.

        Every rank must call it, with the `reason` that all know.
        """
        training, counts = self._training, self.counts
        if training.on_nonfinite == "skip" and counts.in_a_row + 1 < training.max_skipped_steps:
            counts.in_a_row += 1
            counts.skipped_steps += 1
            self.left_out.append((samples.start, samples.stop))
            return
        kept = f"the last whole checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        row, passing = "", "training.on_nonfinite=skip passes over them"
        if training.on_nonfinite == "skip":
            row, passing = f", {counts.in_a_row + 1} such steps in a row", "training.max_skipped_steps may allow more"
        raise NonFiniteError(
            f"step {step} stopped before its update: {reason}{row}; {kept}; go on with --resume and a lower "
            f"training.learning_rate (it stood at {learning_rate:.3g}), more training.warmup_steps, a lower "
            f"training.gradient_clip, or training.precision=fp32, and look at those samples; {passing}"
        )

    def what_is_not_finite(self, result: StepResult, model: nn.Module, own: range, whole: range) -> str:
        """The step's fault in words, the same on every rank: that of the first rank where one can be seen.

        own, whole: this rank's samples and those of the step. Every rank must call it.
        """
        found = list(enumerate(Messages(self._world).share(what_is_not_finite(result, model, own, whole) or "")))
        # A rank's loss is its own; gradients are already summed, and all ranks have their share of what one has spoilt
        rank, text = next((f for f in found if "loss is" in f[1]), next((f for f in found if f[1]), (0, "")))
        if not text:
            return f"the loss is {result.loss}, the gradient norm {result.gradient_norm}, though every part is finite"
        return f"{text} (rank {rank})" if self._world.size > 1 else text

    def go_back(self, step: int, loss: float) -> None:
        """Raise SpikeError where the run may not go back once more."""
        allowed = self._training.spike_rollback.max_rollbacks
        if self.counts.rollbacks >= allowed:
            raise SpikeError(
                f"the loss of step {step} is {loss:.4g}, again a spike, after {allowed} roll-backs: go on with --resume "
                f"and a lower training.learning_rate, and raise training.spike_rollback.max_rollbacks if more may come"
            )

    def went_back(self, samples: range) -> None:
        """The run is back at a checkpoint, whose state has been loaded, and leaves out `samples`."""
        self.counts.rollbacks += 1
        self.left_out.append((samples.start, samples.stop))

    def state(self) -> dict[str, Any]:
        return {**vars(self.counts), "left_out": self.left_out, "spikes": self.spikes.state()}

    def load(self, state: dict[str, Any]) -> None:
        self.counts = _Counts(**{name: state[name] for name in vars(self.counts)})
        self.left_out = [(first, stop) for first, stop in state["left_out"]]
        self.spikes.load(state["spikes"])

"""What a trainer tells whoever listens: plain values, in the order they happen.

A listener is any function of one event; where it has a method `close`, that is called when the run ends, however
it ends. The trainer knows nothing of terminals: metrics.py holds the listeners that write files, and a front end
brings its own. Stopping and Quitting come from the thread that watches signals, Hung from the one that watches the
ranks, all others from the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Preparing:
    """Work before the first step."""

    what: str


@dataclass(frozen=True)
class Tokenizing:
    """Text is being turned into tokens; bytes of files as they lie on disk."""

    done: int
    total: int
    bytes_per_second: float


@dataclass(frozen=True)
class Notice:
    """Something the user should know; training goes on."""

    text: str


@dataclass(frozen=True)
class Started:
    """The first step is about to run."""

    run_folder: Path
    step: int
    """Steps already done (0, or the step resumed from)."""
    total_steps: int
    tokens_per_step: int
    parameters: int
    device: str
    precision: str
    training_tokens: int
    """Tokens in one epoch of the training data."""
    resumed_from: Path | None = None


@dataclass(frozen=True)
class StepDone:
    """One update was made."""

    step: int
    total_steps: int
    loss: float
    """Mean over the trained tokens of the step, nats; nan where there are none."""
    smoothed_loss: float
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    long_term_delay: int
    trained_tokens: int
    """Labels that counted in this step."""
    tokens: int
    """Tokens read since the first step."""
    tokens_per_second: float
    """Over the latest steps, without validation and saving."""
    mfu: float
    """Model FLOPs per second over the peak of all devices together."""
    memory_bytes: int
    """Resident memory of the process on a CPU, the allocator's peak on a GPU."""
    elapsed_seconds: float
    """Spent in training steps since step 0, over all resumptions."""
    seconds_left: float


@dataclass(frozen=True)
class Skipped:
    """A step passed without an update, because its loss or gradient was not finite."""

    step: int
    samples: tuple[int, int]
    """The step's first global sample number, and the one after its last."""
    reason: str
    in_a_row: int
    total: int
    """Skipped steps of the whole run."""


@dataclass(frozen=True)
class RolledBack:
    """The loss jumped: the run is back at a checkpoint, and will not see the samples since then again."""

    step: int
    """Of the checkpoint."""
    spike_step: int
    loss: float
    smoothed_loss: float
    samples: tuple[int, int]
    """The first one that is left out, and the one after the last."""
    count: int
    """How often the run has gone back."""


@dataclass(frozen=True)
class Health:
    """The memories were measured (health.py says what the numbers are)."""

    step: int
    memories: tuple[dict, ...]
    """One for each layer and kind, with `layer`, `memory`, and quantity -> its numbers."""
    seconds: float


@dataclass(frozen=True)
class Validated:
    """Held-out text was read."""

    step: int
    loss: float
    """Mean over its labels, nats."""
    bits_per_byte: float | None
    """None where the corpus does not know the bytes behind its tokens."""
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Validating:
    """Held-out text is being read: `done` of `total` tokens."""

    done: int
    total: int


@dataclass(frozen=True)
class Saving:
    """A checkpoint is about to be written, while training goes on or not."""

    step: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint is whole on disk; later steps may have been made since."""

    step: int
    path: Path
    seconds: float
    """From its beginning until it was whole."""
    stalled_seconds: float
    """For how many of them training stood still."""


@dataclass(frozen=True)
class Stopping:
    """A signal came: the current step will be finished and saved."""

    signal_name: str


@dataclass(frozen=True)
class Quitting:
    """A second Ctrl-C: the process ends at once, without saving."""


@dataclass(frozen=True)
class Hung:
    """A rank has made no progress for too long: `text` names it, and this process ends at once. Comes from a thread of
    its own, while the trainer's is stuck."""

    text: str


@dataclass(frozen=True)
class Ended:
    """Training is over, whole or interrupted."""

    step: int
    total_steps: int
    status: str
    """done or interrupted"""
    checkpoint: Path | None
    """The newest checkpoint of the run."""
    loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    seconds: float
    """Of this process, from the first step to the end."""


Event = (
    Preparing | Tokenizing | Notice | Started | StepDone | Validating | Validated | Saving | Saved | Stopping | Quitting
    | Skipped | RolledBack | Health | Hung | Ended
)
Listener = Callable[[Event], None]

"""Numbers of a run: the smoothed loss, and listeners that write metrics.jsonl and TensorBoard files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

from mmcore.training.events import Ended, Event, Saved, Saving, StepDone, Validated
from mmcore.training.run_folder import disk_errors


class Smoothed:
    """An exponential moving average that is right from the first value on (bias-corrected, as in Adam)."""

    def __init__(self, decay: float = 0.95):
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    def update(self, value: float) -> float:
        """Take in `value`; the new average."""
        self.total = self.decay * self.total + (1.0 - self.decay) * value
        self.weight = self.decay * self.weight + (1.0 - self.decay)
        return self.value

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan

    def state(self) -> dict[str, float]:
        """Plain values for a checkpoint; floats pass through JSON unchanged to the last bit."""
        return {"total": self.total, "weight": self.weight}

    def load(self, state: dict[str, float]) -> None:
        self.total, self.weight = state["total"], state["weight"]


KINDS = {StepDone: "step", Validated: "validation", Saved: "checkpoint"}


def as_line(event: StepDone | Validated | Saved) -> dict:
    """The event as one flat JSON object: `kind` (step, validation, checkpoint) first, then the event's fields; a
    number that is not finite, which JSON cannot hold, is null, and a path its last part."""
    fields = {k: v.name if isinstance(v, Path) else v for k, v in dataclasses.asdict(event).items()}
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    return {"kind": KINDS[type(event)]} | finite


def wanted(event: Event, log_every: int) -> bool:
    """Whether the event belongs into the metrics: every validation and checkpoint, every n-th step, the last one."""
    if isinstance(event, StepDone):
        return event.step % log_every == 0 or event.step == event.total_steps
    return isinstance(event, (Validated, Saved))


class JsonLines:
    """Appends steps, validations and checkpoints to metrics.jsonl; before a checkpoint they are forced to the disk, so that
    a checkpoint never knows of a step that the file has lost."""

    def __init__(self, path: Path, log_every: int):
        self.path, self.log_every = path, log_every
        with disk_errors(path):
            self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        with disk_errors(self.path):
            if wanted(event, self.log_every):
                self._file.write(json.dumps(as_line(event)) + "\n")
                self._file.flush()
            elif isinstance(event, (Saving, Ended)):
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes the same numbers as scalars; lines of a broken run after `step` are hidden (purge_step)."""

    def __init__(self, folder: Path, log_every: int, step: int):
        from torch.utils.tensorboard import SummaryWriter  # 0.1 s: only a training run pays it

        self.folder, self.log_every = folder, log_every
        with disk_errors(folder):
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __call__(self, event: Event) -> None:
        if wanted(event, self.log_every):
            values = as_line(event)
            kind, step = values.pop("kind"), values.pop("step")
            for name, value in values.items():
                if name not in ("total_steps", "path") and value is not None:
                    self._writer.add_scalar(f"{kind}/{name}", value, step)
        elif isinstance(event, (Saving, Ended)):
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def keep_lines_until(path: Path, step: int) -> int:
    """Drop from metrics.jsonl what a broken run wrote after `step`, and a last line that was cut short.

    The file is replaced whole or not at all. Returns the number of lines dropped.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    with disk_errors(path):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                keep = line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                keep = False
            if keep:
                kept.append(line)
            else:
                dropped += 1
        if dropped:
            temporary = path.with_suffix(".jsonl.tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, path)
    return dropped

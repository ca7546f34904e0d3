"""Numbers of a run: the smoothed loss, and listeners that write metrics.jsonl, health.jsonl and TensorBoard files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from mmcore.checkpoint.disk import finite
from mmcore.training.event_file import EventFile
from mmcore.training.events import Ended, Event, Health, RolledBack, Saved, Saving, Skipped, StepDone, Validated
from mmcore.training.run_folder import disk_errors, replace_text

_KINDS = {
    StepDone: "step", Validated: "validation", Saved: "checkpoint", Skipped: "skipped", RolledBack: "rollback"
}  # fmt: skip
"""The events of metrics.jsonl, and what their lines are called."""


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


def as_line(event: Event) -> dict:
    """The event as one flat JSON object: `kind` first, then the event's fields; a number that is not finite, which
    JSON cannot hold, is null, and a path its last part."""
    fields = {k: v.name if isinstance(v, Path) else v for k, v in dataclasses.asdict(event).items()}
    return {"kind": _KINDS[type(event)]} | finite(fields)


def wanted(event: Event, log_every: int) -> bool:
    """Whether the event belongs into the metrics: every n-th step and the last one, and all that is rare."""
    if isinstance(event, StepDone):
        return event.step % log_every == 0 or event.step == event.total_steps
    return type(event) in _KINDS


def numbers(line: dict) -> dict[str, float]:
    """What of a line can be drawn over the steps."""
    return {
        name: value for name, value in line.items()
        if isinstance(value, (int, float)) and name not in ("step", "total_steps")
    }  # fmt: skip


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
        with disk_errors(self.path):
            self._file.close()


class TensorBoard:
    """Writes the same numbers as scalars; lines of a broken run after `step` are hidden (purge_step)."""

    def __init__(self, folder: Path, log_every: int, step: int):
        self.folder, self.log_every = folder, log_every
        with disk_errors(folder):
            self._file = EventFile(folder, purge_step=step + 1 if step else None)

    def __call__(self, event: Event) -> None:
        with disk_errors(self.folder):
            if wanted(event, self.log_every):
                line = as_line(event)
                for name, value in numbers(line).items():
                    self._file.scalar(f"{line['kind']}/{name}", value, line["step"])
            elif isinstance(event, Health):
                for name, values in by_kind(event.memories).items():
                    self._file.histogram(name, values, event.step)
            self._file.flush()

    def close(self) -> None:
        with disk_errors(self.folder):
            self._file.close()


class HealthLines:
    """Appends to health.jsonl: a line for each measurement, with least, quartiles and largest of each quantity."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Health):
            return
        memories = [
            {name: summary(value) if isinstance(value, list) else value for name, value in memory.items() if value != []}
            for memory in event.memories
        ]
        line = {"kind": "health", "step": event.step, "seconds": round(event.seconds, 3), "memories": memories}
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def summary(values: Sequence[float]) -> list[float | None]:
    """Least, quartiles and largest of some numbers, to four digits; null for one that is not finite."""
    marks = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64))
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in marks.tolist()]


def by_kind(memories: Sequence[dict]) -> dict[str, list[float]]:
    """`<memory>/<quantity>` -> the numbers of all layers."""
    found: dict[str, list[float]] = defaultdict(list)
    for memory in memories:
        for name, value in memory.items():
            if isinstance(value, list):
                found[f"{memory['memory']}/{name}"] += [number for number in value if math.isfinite(number)]
    return {name: values for name, values in found.items() if values}


def keep_lines_until(path: Path, step: int) -> int:
    """Drop from metrics.jsonl or health.jsonl what a broken run wrote after `step`, and a last line that was cut short.

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
            replace_text(path, "".join(kept))
    return dropped

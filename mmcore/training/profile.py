"""A trace of some steps, and where memory went in them, for `mm pretrain --profile`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mmcore.distributed.mesh import World
from mmcore.errors import ConfigError
from mmcore.training.events import Event, Notice, Skipped, Started, StepDone
from mmcore.training.run_folder import disk_errors

_HISTORY = 200_000
"""Allocations that the memory snapshot of a GPU remembers."""


class Profile:
    """A listener that records steps `first` to `last`, both included, and writes into `folder`:

    trace-rank-00000.json            what ran when, on the CPU and the GPU (Chrome's trace format)
    operators-rank-00000.txt         the operators that took most time, and those that took most memory
    memory-rank-00000.pickle         GPU only: every allocation with its stack, as PyTorch's viewer reads it
    memory-rank-00000.tsv            CPU only: bytes that PyTorch had allocated, by microsecond

    Ranks of the first node record; the others' listener does nothing.
    """

    def __init__(self, folder: Path, first: int, last: int, world: World, device: torch.device,
                 tell: Callable[[Event], None]):  # fmt: skip
        self.folder, self.first, self.last = folder, first, last
        self._world, self._device, self._tell = world, device, tell
        self._profile: profile | None = None
        self._told = False  # what became of the steps

    def __call__(self, event: Event) -> None:
        if self._world.rank != self._world.local_rank:
            return
        if isinstance(event, Started) and event.step >= self.first:
            self._told = True
            raise ConfigError(
                f"--profile {self.first}:{self.last}: the run is at step {event.step} already, choose later steps"
            )
        if isinstance(event, (Started, StepDone, Skipped)):
            if self._profile is not None and event.step >= self.last:
                self._finish()
            elif self._profile is None and event.step == self.first - 1:
                self._begin()

    def close(self) -> None:
        """Drop a recording that the run's end cut short, and say where there is none."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
        if not self._told and self._world.rank == 0:
            self._tell(Notice(f"steps {self.first} to {self.last} are not profiled: the run ended before"))

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def _finish(self) -> None:
        recorded, self._profile, self._told = self._profile, None, True
        recorded.stop()
        end = f"rank-{self._world.rank:05d}"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            trace = self.folder / f"trace-{end}.json"
            recorded.export_chrome_trace(str(trace))
            self._write_operators(recorded, self.folder / f"operators-{end}.txt")
            memory = self._write_memory(trace, end)
        self._tell(Notice(
            f"steps {self.first} to {self.last} are profiled in {self.folder}: open trace-*.json at "
            f"https://ui.perfetto.dev or chrome://tracing, {memory}"
        ))  # fmt: skip

    def _write_operators(self, recorded: profile, path: Path) -> None:
        averages = recorded.key_averages()
        where = "cuda" if self._device.type == "cuda" else "cpu"
        time_key = "self_device_time_total" if where == "cuda" else "self_cpu_time_total"
        memory_key = "self_device_memory_usage" if where == "cuda" else "self_cpu_memory_usage"
        tables = [averages.table(sort_by=key, row_limit=40, max_name_column_width=60) for key in (time_key, memory_key)]
        path.write_text("\n".join(tables) + "\n", encoding="utf-8")

    def _write_memory(self, trace: Path, end: str) -> str:
        """The memory file of this kind of device, and how to open it."""
        if self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{end}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            return "memory-*.pickle at https://pytorch.org/memory_viz"
        rows = allocated(json.loads(trace.read_text(encoding="utf-8")))
        lines = ["microseconds\tbytes", *(f"{when}\t{size}" for when, size in rows)]
        (self.folder / f"memory-{end}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        peak = max((size for _, size in rows), default=0)
        return f"memory-*.tsv as a table (the peak is {peak / 2**20:.1f} MiB above the start)"


def allocated(trace: dict) -> list[tuple[float, int]]:
    """(microseconds, bytes) after each allocation and release of host memory in a trace, from its first on."""
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    rows, total, start = [], 0, None
    for event in sorted(events, key=lambda event: event["ts"]):
        if event["args"].get("Device Type") != 0:  # 0 is the CPU
            continue
        start = event["ts"] if start is None else start
        total += event["args"]["Bytes"]
        rows.append((round(event["ts"] - start, 3), total))
    return rows

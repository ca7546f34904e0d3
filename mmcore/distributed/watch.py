"""A thread of each rank that notices when the ranks make no progress, and says which one is to blame.

A rank that hangs leaves the others waiting in a collective, where they look just as stuck. So every rank publishes in
the launcher's store, about once a second, how many stages of the run it has reached, and in which lines of code it is.
Where a rank has made no progress for too long, it writes the stacks of its threads into a file and looks at the others:

- a rank that has stopped publishing is stopped, or its machine is gone;
- else the ranks that have reached the fewest stages hold up the others;
- else, at equal stages, those that are not waiting in a collective.

All ranks come to the same verdict within a second or so; each tells it and ends its process, so that the launcher can
start the run again. Python's signal handlers and exceptions would wait for the call that hangs; a thread does not.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil

from mmcore.distributed.mesh import World

if TYPE_CHECKING:
    from torch.distributed import Store

_IDLE_SHARE, _GRACE_SHARE = 0.75, 0.1  # of the timeout: the verdict, and the end, come within it
_FAILED = 1
_FRAMES = 3


class Watch:
    """Watches the ranks of `world` while in its context; `beat` tells it of progress.

    timeout: seconds within which a rank that hangs is named. stacks: the file for this rank's stacks.
    on_hang(sentence) tells the verdict, after which leave(status) ends the process. on_orphan() is called once where
    the process that started this one has gone. Stages in `patient` may take as long as they like, as
    long as all ranks publish.
    """

    def __init__(
        self,
        world: World,
        store: Store,
        timeout: float,
        stacks: Path,
        on_hang: Callable[[str], None],
        on_orphan: Callable[[], None] = lambda: None,
        patient: frozenset[str] = frozenset(),
        leave: Callable[[int], None] = os._exit,
    ):
        self._world, self._store, self._stacks = world, store, stacks
        self._limit, self._grace = _IDLE_SHARE * timeout, min(5.0, _GRACE_SHARE * timeout)
        self._interval = min(1.0, self._grace / 3)
        self._on_hang, self._on_orphan, self._leave, self._patient = on_hang, on_orphan, leave, patient
        self._trainer = threading.get_ident()
        self._parent = os.getppid()
        self._closing = threading.Event()
        self._published = 0
        self._beats = (0, 0, "starting", time.monotonic())
        """Stages reached, step, the present stage, and since when."""
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def beat(self, step: int, stage: str) -> None:
        """The trainer enters a stage of `step`. All ranks must go through the same stages."""
        self._beats = (self._beats[0] + 1, step, stage, time.monotonic())

    def __enter__(self) -> Self:
        self._publish()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join(2 * self._grace)

    def _watch(self) -> None:
        looked = 0.0
        while not self._closing.wait(self._interval):
            self._publish()
            if os.getppid() != self._parent:
                self._parent = os.getppid()
                self._on_orphan()
            reached, _, stage, since = self._beats
            if time.monotonic() - max(since, looked) > self._limit:
                self._end(reached, stage in self._patient)
                looked = time.monotonic()

    def _end(self, reached: int, patient: bool) -> None:
        """Name the rank at fault and leave, unless this rank moves on meanwhile. In a patient stage only a rank that is
        silent is at fault."""
        if not patient:
            self._write_stacks()
        before = self._published_by_all()
        until = time.monotonic() + self._grace
        while time.monotonic() < until:
            if self._closing.wait(self._interval) or self._beats[0] != reached:
                return
            self._publish()
        verdict = self._verdict(before, self._published_by_all(), patient)
        if verdict is not None and self._beats[0] == reached:
            self._on_hang(f"{verdict}; the stacks are in {self._stacks.parent}")
            self._leave(_FAILED)

    def _publish(self) -> None:
        reached, step, stage, since = self._beats
        self._published += 1
        where, waiting = _lines_of(self._trainer)
        report = {
            "published": self._published, "reached": reached, "step": step, "stage": stage,
            "idle": time.monotonic() - since, "where": where, "waiting": waiting,
            "pid": os.getpid(), "host": os.uname().nodename,
        }  # fmt: skip
        with contextlib.suppress(RuntimeError):  # a store that is gone: the others will find this rank silent
            self._store.set(str(self._world.rank), json.dumps(report))

    def _published_by_all(self) -> dict[int, dict[str, Any]]:
        """The latest report of each rank that has made one; none of any where the store does not answer."""
        try:
            known = [rank for rank in range(self._world.size) if self._store.check([str(rank)])]
            return {rank: json.loads(self._store.get(str(rank))) for rank in known}
        except RuntimeError:
            return {}

    def _write_stacks(self) -> None:
        _, step, stage, since = self._beats
        with contextlib.suppress(OSError), self._stacks.open("a", encoding="utf-8") as file:
            now = time.strftime("%Y-%m-%d %H:%M:%S%z")
            idle = time.monotonic() - since
            file.write(f"--- {now} rank {self._world.rank}, step {step}, {stage}, no progress for {idle:.1f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _verdict(self, before: Mapping[int, dict], now: Mapping[int, dict], patient: bool) -> str | None:
        if not now:
            return "no progress, and the launcher's store does not answer: the node that holds it is gone"
        silent = [r for r in range(self._world.size) if r not in now or now[r]["published"] == _count(before, r)]
        if silent:
            return "; ".join(_describe(rank, now.get(rank), True) for rank in silent[:4])
        if patient:
            return None
        fewest = min(report["reached"] for report in now.values())
        blamed = [rank for rank, report in now.items() if report["reached"] == fewest]
        if len(blamed) == len(now):
            blamed = [rank for rank in blamed if not now[rank]["waiting"]] or blamed
        return "; ".join(_describe(rank, now[rank], False) for rank in blamed[:4])


def _count(reports: Mapping[int, dict], rank: int) -> int | None:
    return reports[rank]["published"] if rank in reports else None


def _describe(rank: int, report: dict[str, Any] | None, silent: bool) -> str:
    if report is None:
        return f"rank {rank} never came as far as the first step"
    who = f"rank {rank} (pid {report['pid']} on {report['host']})"
    stage, lines = f"step {report['step']}, {report['stage']}", " < ".join(report["where"])
    if silent:
        return f"{who} does not answer ({_state(report)}): it was last seen at {stage}, in {lines}"
    return f"{who} makes no progress: it has been at {stage}, for {report['idle']:.0f} s, in {lines}"


def _state(report: dict[str, Any]) -> str:
    """What the system says of a process of this machine."""
    if report["host"] != os.uname().nodename:
        return "stopped, or its machine is gone"
    try:
        return f"its process is {psutil.Process(report['pid']).status()}"
    except psutil.Error:
        return "its process is gone"


def _lines_of(thread: int) -> tuple[list[str], bool]:
    """The innermost lines of a thread, and whether they are those of a collective that waits for other ranks."""
    frame = sys._current_frames().get(thread)
    lines, waiting = [], False
    while frame is not None and len(lines) < _FRAMES:
        path = frame.f_code.co_filename
        waiting |= f"torch{os.sep}distributed" in path or path.startswith(os.path.dirname(__file__))
        lines.append(f"{os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return lines, waiting

"""TensorBoard's files of events, written where they are asked for.

torch's SummaryWriter writes in a thread of its own. Where the disk refuses, that thread prints its traceback over the
run's display and dies, and the run hears of it some steps later, if at all.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_ABOVE = 1e-12 * 1.1 ** np.arange(774)
_BINS = np.concatenate([-_ABOVE[::-1], [0.0], _ABOVE])
"""Ends of a histogram's bins, a tenth apart up to 1e20: TensorBoard's own."""
_numbers = itertools.count()
"""Tell apart the files that one process begins within a second."""


class EventFile:
    """A new file in `folder`. purge_step: what earlier files hold from this step on is hidden.

    Every method raises OSError.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # 0.1 s: only a training run pays it
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self._event = Event
        self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def _add(self, **values: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **values).SerializeToString())

    def scalar(self, name: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._add(step=step, summary=scalar(name, value))

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        from torch.utils.tensorboard.summary import histogram

        self._add(step=step, summary=histogram(name, np.array(values), _BINS))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

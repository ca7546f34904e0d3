"""Ctrl-C and a scheduler's signals as a request: finish the step, save, leave.

SIGTERM comes before a machine is taken away, SIGUSR1 or SIGUSR2 where the user asked the scheduler for one (SLURM's
--signal).

Signals are read from a pipe by a thread of their own. Python runs its signal handlers between two bytecodes
of the main thread, and one backward pass is a single bytecode that can take seconds; the thread answers at
once, and a second Ctrl-C ends the process there and then.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupts:
    """A context in which the first of CAUGHT sets `received` and calls `on_first(signal)`.

    A SIGINT after that calls `on_second()` and exits with status 130 at once; more of the others change nothing.
    Outside the main thread Python can catch no signals: the context then leaves them as they are.
    """

    def __init__(
        self,
        on_first: Callable[[signal.Signals], None] = lambda number: None,
        on_second: Callable[[], None] = lambda: None,
    ):
        self.received: signal.Signals | None = None
        self._on_first, self._on_second = on_first, on_second
        self._active = False

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # The handlers do nothing themselves: they exist so that Python writes each signal into the pipe
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in CAUGHT}
        self._wakeup = signal.set_wakeup_fd(self._write_end)
        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._active:
            return
        self._active = False
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._write_end)  # the watcher reads the end of the file and returns
        self._thread.join()
        os.close(self._read_end)

    def ask(self, number: signal.Signals) -> None:
        """The same as receiving it, from any thread."""
        self._handle(number)

    def _watch(self) -> None:
        while received := os.read(self._read_end, 64):
            for number in received:
                if number in CAUGHT:
                    self._handle(signal.Signals(number))

    def _handle(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received = number
            self._on_first(number)
        elif number == signal.SIGINT:
            self._on_second()
            os._exit(128 + signal.SIGINT)

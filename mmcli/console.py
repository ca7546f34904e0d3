"""What a training run shows: a live panel in a terminal, plain lines anywhere else.

Both are listeners of the trainer's events. Rich is imported only for the panel: plain lines must not wait for it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mmcli.terminal import drop_output, make_console
from mmcore.training import events

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

BARS = "▁▂▃▄▅▆▇█"


def make_view(title: str, go_on: str, stream: TextIO | None = None) -> PlainView:
    """The live panel where `stream` (standard output) is a terminal that can move its cursor, else plain lines.

    go_on: the command line that resumes the run, for whoever interrupts it.
    """
    stream = stream or sys.stdout
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveView(title, go_on, make_console(file=stream, highlight=False))
    return PlainView(title, go_on, stream)


class PlainView:
    """Lines of text, one for a step at most every `interval` seconds, one for each thing that is rare."""

    def __init__(self, title: str, go_on: str, stream: TextIO | None = None, interval: float = 5.0):
        self.title, self.go_on, self.interval = title, go_on, interval
        self._stream = stream or sys.stdout
        self._last_line = float("-inf")
        self._run_folder: Path | None = None

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.Preparing(what):
                self.say(what)
            case events.Tokenizing():
                self.on_tokenizing(event)
            case events.Notice(text):
                self.say(f"note: {text}")
            case events.Started():
                self._run_folder, self._last_line = event.run_folder, float("-inf")
                self.say(started_line(event))
            case events.StepDone():
                self.on_step(event)
            case events.Validated():
                self.say(validation_line(event))
            case events.Saved():
                self.say(saved_line(event))
            case events.Stopping():
                self.say(f"{event.signal_name}: finishing this step and saving (Ctrl-C quits at once)")
            case events.Quitting():
                self.say("quitting without saving")
            case events.Skipped():
                self.say(
                    f"step {event.step:,}: skipped, {event.reason} ({event.in_a_row} in a row, {event.total} in all)"
                )
            case events.RolledBack():
                self.say(rolled_back_line(event))
            case events.Hung():
                self.say(f"mm: {event.text}")
            case events.Ended():
                self.say("\n".join(ending(event, self._run_folder, self.go_on)))

    def on_step(self, event: events.StepDone) -> None:
        now = time.monotonic()
        if now - self._last_line >= self.interval or event.step == event.total_steps:
            self._last_line = now
            self.say(step_line(event))

    def on_tokenizing(self, event: events.Tokenizing) -> None:
        now = time.monotonic()
        if now - self._last_line >= self.interval:
            self._last_line = now
            self.say(tokenizing_line(event))

    def say(self, text: str) -> None:
        """Print a line now. Training goes on where nobody reads them any more: a `tee` that died is no reason to stop."""
        try:
            print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            drop_output()
            with contextlib.suppress(OSError):
                print("mm: nobody reads the output any more; training goes on without it", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Give the terminal back."""


class LiveView(PlainView):
    """A panel that stays at the bottom of the terminal; what is rare is printed above it and scrolls away."""

    def __init__(self, title: str, go_on: str, console: Console):
        super().__init__(title, go_on)
        self._console = console
        self._live = None
        self._quiet = _NoControlEcho()
        self._stage = "starting"
        self._since = time.monotonic()
        self._step: events.StepDone | None = None
        self._step_at = 0.0
        self._validation: events.Validated | None = None
        self._losses: deque[float] = deque(maxlen=4096)

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.Preparing(what):
                self._stage = what
                self._open()
            case events.Started():
                self._stage, self._since = "first step", time.monotonic()
                super().__call__(event)
                self._open()
            case events.Validating():
                self._stage = f"validating {event.done / max(1, event.total):.0%}"
            case events.Saving():
                self._stage = "saving"
            case events.Stopping():
                self._stage = f"{event.signal_name}: finishing this step and saving (Ctrl-C again quits at once)"
            case events.Quitting():
                self._console.show_cursor(True)
                self._quiet.leave()
            case events.Ended() | events.Hung():
                self.close()
                super().__call__(event)
            case events.Validated():
                self._stage, self._validation = "training", event
                super().__call__(event)
            case events.Saved():
                self._stage = "training"
                super().__call__(event)
            case _:
                super().__call__(event)

    def on_step(self, event: events.StepDone) -> None:
        if not self._stage.startswith("SIG"):
            self._stage = "training"
        self._step, self._step_at = event, time.monotonic()
        if event.trained_tokens:
            self._losses.append(event.loss)

    def on_tokenizing(self, event: events.Tokenizing) -> None:
        self._stage = tokenizing_line(event)

    def say(self, text: str) -> None:
        if self._live is None and text == "loading torch":
            self._stage = text
            self._open()
            return
        self._console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._quiet.leave()

    def _open(self) -> None:
        if self._live is None:
            from rich.live import Live

            # transient: the last panel would repeat what the closing lines say
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)
            self._quiet.enter()
            self._live.start()

    def __rich__(self) -> RenderableType:
        """The panel as of now; rich calls this four times a second."""
        from rich import box
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        if self._step is None:
            waited = seconds(time.monotonic() - self._since)
            return Panel(Text(f"{self._stage} ...  {waited}"), title=self.title, title_align="left", box=box.ROUNDED)
        step = self._step
        width = max(10, self._console.width - 6)
        cells = self._cells(step)
        columns = max(1, min(3, width // 28))
        rows = -(-len(cells) // columns)
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(columns):
            table.add_column(ratio=1)
        for row in range(rows):
            table.add_row(*(_cell(name, value) for name, value in cells[row::rows]))
        body = Group(self._progress(step, width), Text(), table, Text(), self._curve(width))
        name = f"{self.title} {self._run_folder or ''}".strip()
        return Panel(
            body, title=name, title_align="left", subtitle=self._stage, subtitle_align="right", box=box.ROUNDED
        )

    def _cells(self, step: events.StepDone) -> list[tuple[str, str]]:
        """What the panel shows, column after column."""
        validation = self._validation
        bits = validation.bits_per_byte if validation is not None else None
        left = max(0.0, step.seconds_left - (time.monotonic() - self._step_at))
        return [
            ("loss", loss_of(step)),
            ("smoothed", f"{step.smoothed_loss:.4f}"),
            ("validation", f"{validation.loss:.4f}" if validation is not None else "-"),
            ("bits/byte", f"{bits:.4f}" if bits is not None else "-"),
            ("tokens/s", f"{step.tokens_per_second:,.0f}"),
            ("MFU", f"{step.mfu:.1%}"),
            ("memory", size(step.memory_bytes)),
            ("tokens", count(step.tokens)),
            ("elapsed", seconds(step.elapsed_seconds)),
            ("time left", seconds(left)),
            ("learning rate", f"{step.learning_rate:.2e}"),
            ("gradient", f"{step.gradient_norm:.3f}"),
        ]

    def _progress(self, step: events.StepDone, width: int) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        share = step.step / step.total_steps
        line = Table.grid(expand=True)
        line.add_column()
        line.add_column(justify="right")
        label = f" {step.step:,} / {step.total_steps:,}  {share:.0%}"
        room = max(5, width - len(label))
        filled = round(room * share)
        bar = Text("━" * filled, style="green") + Text("━" * (room - filled), style="bright_black")
        line.add_row(bar, Text(label, no_wrap=True))
        return line

    def _curve(self, width: int) -> RenderableType:
        from rich.text import Text

        line = sparkline(list(self._losses), width)
        return Text(line, style="cyan", no_wrap=True)


class _NoControlEcho:
    """Keeps the terminal from echoing "^C": two characters behind the panel's corner would push it down a line."""

    def __init__(self) -> None:
        self._before: list | None = None

    def enter(self) -> None:
        if sys.stdin is not None and sys.stdin.isatty():
            import termios

            self._before = termios.tcgetattr(sys.stdin)
            changed = termios.tcgetattr(sys.stdin)
            changed[3] &= ~termios.ECHOCTL
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)

    def leave(self) -> None:
        if self._before is not None:
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)
            self._before = None


def _cell(name: str, value: str) -> RenderableType:
    from rich.text import Text

    return Text.assemble((f"{name:<13} ", "dim"), (value, "bold"), no_wrap=True)


def sparkline(values: list[float], width: int) -> str:
    """The course of `values` in at most `width` characters; each is the mean of its share of them."""
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [i * len(values) // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def loss_of(event: events.StepDone) -> str:
    """The loss; of a step whose conversations had no word to learn there is none."""
    return f"{event.loss:.4f}" if event.trained_tokens else "-"


def step_line(event: events.StepDone) -> str:
    """One step in a line."""
    return (
        f"step {event.step:,}/{event.total_steps:,}  loss {loss_of(event)}  smoothed {event.smoothed_loss:.4f}  "
        f"lr {event.learning_rate:.2e}  gradient {event.gradient_norm:.2f}  {event.tokens_per_second:,.0f} tokens/s  "
        f"MFU {event.mfu:.1%}  memory {size(event.memory_bytes)}  left {seconds(event.seconds_left)}"
    )


def tokenizing_line(event: events.Tokenizing) -> str:
    """How far tokenizing has come."""
    share = event.done / max(1, event.total)
    return f"tokenizing {share:.0%} of {size(event.total)}, {size(event.bytes_per_second)}/s"


def validation_line(event: events.Validated) -> str:
    bits = f" ({event.bits_per_byte:.4f} bits per byte)" if event.bits_per_byte is not None else ""
    where = f"on {count(event.tokens)} tokens, {seconds(event.seconds)}"
    return f"step {event.step:,}: validation loss {event.loss:.4f}{bits} {where}"


def rolled_back_line(event: events.RolledBack) -> str:
    """Why and where to the run went back."""
    first, stop = event.samples
    return (
        f"step {event.spike_step:,}: loss {event.loss:.4f} is a spike above {event.smoothed_loss:.4f}: back at step "
        f"{event.step:,}, samples {first:,} to {stop - 1:,} are left out (roll-back {event.count})"
    )


def saved_line(event: events.Saved) -> str:
    """Where a checkpoint lies, and what it cost."""
    stalled = f", training stood still for {seconds(event.stalled_seconds)}" if event.stalled_seconds < event.seconds else ""
    return f"step {event.step:,}: saved {shown_path(event.path)} in {seconds(event.seconds)}{stalled}"


def started_line(event: events.Started) -> str:
    """What is about to be trained, where, for how long."""
    words = [f"{count(event.parameters)} parameters on {event.device} in {event.precision}"]
    length = f"{event.total_steps:,} steps of {count(event.tokens_per_step)} tokens"
    if event.training_tokens:
        epochs = event.total_steps * event.tokens_per_step / event.training_tokens
        length += f" ({epochs:.2g} x the {count(event.training_tokens)} tokens of text)"
    words.append(length)
    if event.resumed_from is not None:
        words.append(f"from step {event.step:,} on")
    wait = "\nthe first step compiles kernels for this GPU: about a minute" if event.device.startswith("cuda") else ""
    return f"{', '.join(words)}\nrun folder: {event.run_folder}{wait}"


def ending(event: events.Ended, run_folder: Path | None, go_on: str) -> list[str]:
    """What came out, where it lies, and what to run next."""
    if event.status != "done":
        where = f"saved {shown_path(event.checkpoint)}" if event.checkpoint else "nothing to save yet"
        return [f"stopped at step {event.step:,} of {event.total_steps:,}: {where}", f"go on with: {go_on}"]
    losses = []
    if event.loss is not None:
        losses.append(f"loss {event.loss:.4f}")
    if event.validation_loss is not None:
        losses.append(f"validation {event.validation_loss:.4f}")
    if event.bits_per_byte is not None:
        losses.append(f"{event.bits_per_byte:.4f} bits per byte")
    summary = f"done: {event.total_steps:,} steps in {seconds(event.seconds)}"
    lines = [": ".join([summary, ", ".join(losses)]) if losses else summary]
    if event.checkpoint is not None:
        lines.append(f"checkpoint: {shown_path(event.checkpoint)}")
    folder = shlex.quote(str(run_folder))
    lines.append(f"next: mm eval {folder} --data FILE, or mm chat {folder}")
    return lines


def shown_path(path: Path) -> str:
    """Relative to the working folder where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def seconds(value: float) -> str:
    """3.2 s, 4m 10s, 2h 05m, 3d 04h."""
    if value < 10:
        return f"{value:.1f} s"
    whole = int(value + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d {whole % 86_400 // 3600:02d}h"


def size(value: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit in ("B", "KiB") else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(value: float) -> str:
    """Three digits and a unit: 4,096 stays; 6.29 M, 9.93 B."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g} {unit}"
    return f"{value:,.0f}"

"""What a run looks like: plain lines, and the live panel as recorded from a console."""

import dataclasses
import io
import os
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mmcli.console import LiveView, PlainView, count, ending, make_view, seconds, size, sparkline
from mmcore.training import events

RUN = Path("runs/tiny")


def step(number, loss=2.5, total=100):
    return events.StepDone(number, total, loss, loss + 0.1, 3e-4, 0.75, 100, 900, 1024 * number, 12_345.6, 0.423, 3 * 2**30,
                           75.0, 250.0)  # fmt: skip


STARTED = events.Started(RUN, 0, 100, 1024, 6_290_000, "cpu", "fp32", 50_000)
VALIDATED = events.Validated(50, 2.25, 1.1, 30_000, 2.0)
SAVED = events.Saved(50, RUN / "checkpoints/step-000050", 0.4, 0.1)
DONE = events.Ended(100, 100, "done", RUN / "checkpoints/step-000100", 2.1, 2.2, 1.05, 300.0)
STOPPED = events.Ended(50, 100, "interrupted", RUN / "checkpoints/step-000050", 2.1, None, None, 30.0)


def plain(*happened, interval=0.0):
    stream = io.StringIO()
    view = PlainView("mm pretrain", "mm pretrain tiny.yaml --resume", stream, interval=interval)
    for event in happened:
        view(event)
    view.close()
    return stream.getvalue().splitlines()


def test_plain_lines():
    started, folder, first, validated, saved, *end = plain(STARTED, step(1), VALIDATED, SAVED, DONE)
    assert started == (
        "6.29 M parameters on cpu in fp32, 100 steps of 1,024 tokens (2 x the 50 k tokens of text)"
    )
    assert folder == "run folder: runs/tiny"
    assert first == (
        "step 1/100  loss 2.5000  smoothed 2.6000  lr 3.00e-04  gradient 0.75  12,346 tokens/s  MFU 42.3%  "
        "memory 3.0 GiB  left 4m 10s"
    )
    assert validated == "step 50: validation loss 2.2500 (1.1000 bits per byte) on 30 k tokens, 2.0 s"
    assert saved == "step 50: saved runs/tiny/checkpoints/step-000050 in 0.4 s, training stood still for 0.1 s"
    assert end == [
        "done: 100 steps in 5m 00s: loss 2.1000, validation 2.2000, 1.0500 bits per byte",
        "checkpoint: runs/tiny/checkpoints/step-000100",
        "next: mm eval runs/tiny --data FILE, or mm chat runs/tiny",
    ]


def test_on_a_gpu_the_wait_before_the_first_step_is_explained():
    assert plain(dataclasses.replace(STARTED, device="cuda:0"))[-1].startswith("the first step compiles kernels")


def test_lines_of_steps_are_rare_but_the_last_is_shown():
    shown = plain(*(step(number) for number in range(1, 101)), interval=60)
    assert [line.split()[1] for line in shown] == ["1/100", "100/100"]


def test_an_interrupted_run_says_how_to_go_on():
    shown = plain(STARTED, step(50), events.Stopping("SIGINT"), SAVED, STOPPED)
    assert shown[3] == "SIGINT: finishing this step and saving (Ctrl-C quits at once)"
    assert shown[-2:] == [
        "stopped at step 50 of 100: saved runs/tiny/checkpoints/step-000050",
        "go on with: mm pretrain tiny.yaml --resume",
    ]
    nothing = events.Ended(0, 100, "interrupted", None, None, None, None, 1.0)
    assert ending(nothing, RUN, "x")[0] == "stopped at step 0 of 100: nothing to save yet"


def live(width=100):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30, record=True, highlight=False)
    return LiveView("mm pretrain", "mm pretrain tiny.yaml --resume", console), console


def panel(view, console):
    """The panel as it would be drawn now, as text."""
    with console.capture() as capture:
        console.print(view)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capture.get())


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
def test_the_panel_shows_everything_and_fits(width):
    view, console = live(width)
    view(STARTED)
    for number in range(1, 51):
        view(step(number, loss=5 - number / 20))
    view(VALIDATED)
    view.close()
    text = panel(view, console)
    for part in ("50 / 100", "50%", "2.5000", "2.6000", "2.2500", "1.1000", "12,346", "42.3%", "3.0 GiB", "3.00e-04", "51.2 k"):
        assert part in text, (part, text)
    for name in ("loss", "smoothed", "validation", "bits/byte", "tokens/s", "MFU", "memory", "elapsed", "time left"):
        assert name in text
    assert "█" in text and "▁" in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_panel_before_the_first_step_says_what_goes_on():
    view, console = live()
    view(events.Preparing("making a tokenizer"))
    assert "making a tokenizer" in panel(view, console)
    view(events.Tokenizing(2**20, 2**22, 2**20))
    assert "tokenizing 25% of 4.0 MiB" in panel(view, console)
    view.close()


def test_rare_things_are_printed_above_the_panel_and_stay():
    view, console = live()
    for event in (STARTED, step(1), VALIDATED, SAVED, events.Notice("passed [over] step 3"), DONE):
        view(event)
    text = console.export_text()
    for part in ("6.29 M parameters", "validation loss 2.2500", "saved runs/tiny", "note: passed [over] step 3", "next: mm eval"):
        assert part in text


def test_the_stage_is_shown_while_saving_and_stopping():
    view, console = live()
    view(STARTED)
    view(step(1))
    view(events.Validating(1, 4))
    assert "validating 25%" in panel(view, console)
    view(events.Saving(1))
    assert "saving" in panel(view, console)
    view(events.Stopping("SIGINT"))
    view(step(2))
    assert "Ctrl-C again quits at once" in panel(view, console)
    view.close()


def test_lines_where_the_output_is_no_terminal():
    assert type(make_view("t", "g", io.StringIO())) is PlainView


def test_sparkline():
    assert sparkline([], 10) == ""
    assert sparkline([1.0], 10) == "▁"
    assert sparkline([0, 7], 10) == "▁█"
    assert sparkline(list(range(8)), 8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(1000)), 50)) == 50


@pytest.mark.parametrize(
    ("value", "text"), [(3.21, "3.2 s"), (42, "42 s"), (59.9, "1m 00s"), (250, "4m 10s"), (7500, "2h 05m"), (273_600, "3d 04h")]
)
def test_seconds(value, text):
    assert seconds(value) == text


def test_sizes_and_counts():
    assert [size(v) for v in (5, 2048, 3 * 2**20, 2**40)] == ["5 B", "2 KiB", "3.0 MiB", "1.0 TiB"]
    assert [count(v) for v in (4096, 51_200, 6.29e6, 9.93e9, 1e12)] == ["4,096", "51.2 k", "6.29 M", "9.93 B", "1 T"]


def test_training_goes_on_where_nobody_reads(monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))
    view = make_view("mm pretrain", "mm pretrain r.yaml --resume")
    for text in ("step 1", "step 2"):
        view.say(text)
    print("and whoever else prints", flush=True)
    assert capfd.readouterr().err == "mm: nobody reads the output any more; training goes on without it\n"

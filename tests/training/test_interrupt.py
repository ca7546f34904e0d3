"""The first signal asks, the second Ctrl-C ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mmcore.training.interrupt import Interrupts


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_noted_and_told(number):
    heard = []
    before = signal.getsignal(number)
    with Interrupts(on_first=heard.append) as interrupts:
        assert interrupts.received is None
        os.kill(os.getpid(), number)
        assert wait_until(lambda: interrupts.received == number)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat itself
        time.sleep(0.05)
    assert heard == [number] and interrupts.received == number
    assert signal.getsignal(number) == before


def test_a_request_may_come_from_within():
    heard = []
    with Interrupts(on_first=heard.append) as interrupts:
        interrupts.ask(signal.SIGTERM)
        interrupts.ask(signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM and heard == [signal.SIGTERM]


def test_handlers_come_back_after_an_error():
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        with pytest.raises(ValueError, match="inside"), Interrupts():
            raise ValueError("inside")
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, found)


def test_outside_the_main_thread_signals_stay_as_they_are():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with Interrupts() as interrupts:
            seen.append(interrupts.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None] and signal.getsignal(signal.SIGINT) == before


SECOND = """
import sys, time
from mmcore.training.interrupt import Interrupts
with Interrupts(on_first=lambda n: print("first", flush=True), on_second=lambda: print("second", flush=True)):
    print("ready", flush=True)
    sorted(range(30_000_000), key=lambda i: -i % 7919)  # one long call: no bytecode of ours runs meanwhile
    time.sleep(60)
"""


def test_a_second_ctrl_c_quits_at_once():
    process = subprocess.Popen([sys.executable, "-c", SECOND], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "first\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "second\n"
    assert process.wait(20) == 130

"""Runs of two ranks, hurt in every way: they stop together, come back, and end like the unbroken run."""

import functools
import re
import signal
import time

import pytest

from tests.distributed.launched import Run, losses, prepare, same_end
from tests.helpers.ranks import free_port

pytestmark = pytest.mark.slow
STEPS = 60
TIMEOUT = 20.0


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Started by torchrun itself."""
    folder = tmp_path_factory.mktemp("unbroken")
    prepare(folder, folder, steps=STEPS, validation_every=20)
    run = Run(folder, torchrun=True)
    assert run.wait() == 0, run.said()
    assert run.said().count("run folder:") == 1 and "step 60/60" in run.said()  # rank 0 alone has the terminal
    assert "step 60/60" in (folder / "run/logs/rank-00001.log").read_text()
    return folder


def test_stopped_killed_and_frozen_it_ends_like_the_unbroken_run(unbroken, tmp_path, request):
    """One run: SIGTERM to the launcher; SIGUSR1 to rank 1; SIGKILL of rank 1; SIGSTOP of rank 0."""
    start = functools.partial(started, request)
    prepare(tmp_path, unbroken, steps=STEPS, validation_every=20, distributed={"timeout_seconds": TIMEOUT})

    run = start(tmp_path)
    step = run.wait_for_step(3)
    run.signal(signal.SIGTERM)
    assert run.wait() == 75, run.said()
    stopped = stopped_at(run)
    assert step <= stopped <= step + 4 and (tmp_path / f"run/checkpoints/step-{stopped:06d}/manifest.json").exists()
    assert f"go on with: mm pretrain {tmp_path / 'tiny.yaml'} --gpus 0 --ranks 2 --resume" in run.said()

    run = start(tmp_path, "--resume")
    run.wait_for_step(stopped + 3)
    run.signal(signal.SIGUSR1, rank=1)
    assert run.wait() == 75, run.said()
    assert "SIGUSR1 on another rank: finishing this step and saving" in run.said()
    assert stopped_at(run) > stopped

    run = start(tmp_path, "--resume")
    run.wait_for_step(stopped_at(run) + 8)
    run.signal(signal.SIGKILL, rank=1)
    run.wait_for_step(stopped_at(run) + 14, starts=2)
    assert "mm: rank 1 was killed by SIGKILL; starting all ranks again from the newest checkpoint (may do so 2 more times)" in run.said()
    assert "Traceback" not in run.said() and "Connection" in run.said()
    frozen = time.monotonic()
    at = run.wait_for_step(0)
    run.signal(signal.SIGSTOP, rank=0)
    text = wait_for(run, r"mm: rank 1 ended with status 1: (rank 0 \(pid \d+ on .*\) does not answer.*)")
    assert time.monotonic() - frozen < TIMEOUT + 5  # the launcher tells what rank 1 found within the timeout
    # Ranks say where they are once a second, in which a step of a tenth of one gets ahead of what is known.
    seen = int(re.search(r"at step (\d+), ", text)[1])
    assert "its process is stopped" in text and at - 12 <= seen <= at + 2, text
    assert run.wait() == 0, run.said()
    assert "rank 1, step" in (tmp_path / "run/logs/rank-00001.stacks.txt").read_text()
    assert losses(tmp_path) == losses(unbroken)
    assert same_end(tmp_path, unbroken, STEPS)


def started(request, *arguments, **settings):
    run = Run(*arguments, **settings)
    request.addfinalizer(run.end)
    return run


def stopped_at(run):
    return int(re.findall(r"stopped at step (\d+) of 60: saved", run.said())[-1])


def wait_for(run, pattern, seconds=120):
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, run.said())):
        assert time.monotonic() < end and run.process.poll() is None, run.said()
        time.sleep(0.05)
    return found[1]


def test_two_nodes_meet_and_start_again_together(unbroken, tmp_path, request):
    """Two launchers of one rank each; one loses its rank, and the other's starts again with it, uncounted."""
    prepare(tmp_path, unbroken, steps=STEPS, validation_every=20)
    nodes = (2, f"127.0.0.1:{free_port()}")
    one, two = (started(request, tmp_path, ranks=1, nodes=nodes) for _ in range(2))
    one.wait_for_step(12)
    one.signal(signal.SIGKILL, rank=1)
    assert one.wait() == 0 and two.wait() == 0, one.said()
    (resumed,) = re.findall(r"from step (\d+) on", one.said())
    assert int(resumed) >= 10, one.said()  # later ones where the signal came late
    assert same_end(tmp_path, unbroken, STEPS)


def test_a_mistake_is_told_once(unbroken):
    run = Run(unbroken, "--max-restarts", "2")
    assert run.wait() == 2
    (complaint,) = re.findall(r"^mm: .*$", run.said(), re.MULTILINE)
    assert "already holds checkpoints" in complaint and "Traceback" not in run.said()

"""The watch over ranks: threads stand for the ranks here; real processes hang in test_launched.py."""

import threading
import time

import pytest
from torch.distributed import HashStore

from mmcore.distributed.mesh import World
from mmcore.distributed.watch import Watch, _describe

TIMEOUT = 2.0
# The stand-in for os._exit ends a watching thread with SystemExit
pytestmark = [
    pytest.mark.slow,  # what is watched for takes its time
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


class Ranks:
    """Threads that each run `work(watch, stop)` under a watch of their own; what the watches said and did."""

    def __init__(self, folder, works, timeout=TIMEOUT):
        self.said, self.left, self.stop = {}, {}, threading.Event()
        self.folder, self.timeout, self.store = folder, timeout, HashStore()
        self.began = time.monotonic()
        threads = [threading.Thread(target=self._rank, args=(rank, len(works), work)) for rank, work in enumerate(works)]
        for thread in threads:
            thread.start()
        self.stop.wait(3 * timeout)
        self.stop.set()
        for thread in threads:
            thread.join(10)

    def _rank(self, rank, size, work):
        def leave(status):
            self.left[rank] = (status, time.monotonic() - self.began)
            if len(self.left) >= self.expected(size):
                self.stop.set()
            self.stop.wait()
            raise SystemExit

        watch = Watch(
            World(rank, size), self.store, self.timeout, self.folder / f"rank-{rank}.stacks.txt",
            lambda text: self.said.__setitem__(rank, text), patient=frozenset({"saving"}), leave=leave,
        )  # fmt: skip
        with watch:
            work(watch, self.stop)

    def expected(self, size):
        return size


def waiting(watch, stop):
    """A rank that has come further and waits for the others."""
    watch.beat(7, "waiting for data")
    watch.beat(7, "forward and backward")
    stop.wait()


def sleeping_in_the_loader(watch, stop):
    watch.beat(7, "waiting for data")
    stop.wait()


def test_the_rank_that_is_behind_is_named_with_its_stack_within_the_timeout(tmp_path):
    ranks = Ranks(tmp_path, [waiting, sleeping_in_the_loader, waiting])
    assert set(ranks.said) == {0, 1, 2} and len(set(text.split(", for")[0] for text in ranks.said.values())) == 1
    text = ranks.said[0]
    assert text.startswith("rank 1 (pid ") and "makes no progress" in text and "at step 7, waiting for data" in text
    assert "sleeping_in_the_loader" in text and str(tmp_path) in text and "rank 0 " not in text and "\n" not in text
    assert all(status == 1 and seconds < TIMEOUT for status, seconds in ranks.left.values())
    stacks = (tmp_path / "rank-1.stacks.txt").read_text()
    assert "rank 1, step 7, waiting for data, no progress for" in stacks and "sleeping_in_the_loader" in stacks


def test_a_rank_that_falls_silent_is_named_before_one_that_is_behind(tmp_path):
    def falls_silent(watch, stop):
        watch.beat(7, "waiting for data")
        watch.beat(7, "forward and backward")
        time.sleep(0.3)
        watch._closing.set()
        stop.wait()

    class TwoLeave(Ranks):
        def expected(self, size):
            return size - 1

    ranks = TwoLeave(tmp_path, [sleeping_in_the_loader, waiting, falls_silent])
    assert set(ranks.said) == {0, 1}
    for text in ranks.said.values():
        assert text.startswith("rank 2 (pid ") and "does not answer (its process is " in text
        assert "was last seen at step 7, forward and backward" in text and "falls_silent" in text


def test_at_equal_stages_the_rank_outside_a_collective_is_named(tmp_path, monkeypatch):
    def computing(watch, stop):
        watch.beat(3, "forward and backward")
        stop.wait()

    def waiting_in_a_collective(watch, stop):
        watch.beat(3, "forward and backward")
        stop.wait()

    from mmcore.distributed import watch as module

    plain = module._lines_of

    def lines_of(thread):
        lines, _ = plain(thread)
        return lines, any("waiting_in_a_collective" in line for line in lines)

    monkeypatch.setattr(module, "_lines_of", lines_of)
    ranks = Ranks(tmp_path, [waiting_in_a_collective, computing])
    assert all(text.startswith("rank 1 ") and "rank 0" not in text for text in ranks.said.values())


def test_progress_and_patient_stages_are_left_alone(tmp_path):
    def steady(watch, stop):
        for step in range(40):
            watch.beat(step, "forward and backward")
            time.sleep(0.05)

    def saving(watch, stop):
        watch.beat(1, "saving")
        time.sleep(2.0)

    ranks = Ranks(tmp_path, [steady, saving], timeout=1.0)
    assert not ranks.said and not ranks.left and not list(tmp_path.iterdir())


def test_a_rank_that_falls_silent_while_all_save_is_named(tmp_path):
    def saving(watch, stop):
        watch.beat(1, "saving")
        stop.wait()

    def falls_silent(watch, stop):
        watch.beat(1, "saving")
        time.sleep(0.3)
        watch._closing.set()
        stop.wait()

    class OneLeaves(Ranks):
        def expected(self, size):
            return 1

    ranks = OneLeaves(tmp_path, [saving, falls_silent])
    assert set(ranks.said) == {0} and ranks.said[0].startswith("rank 1 (pid ") and "does not answer" in ranks.said[0]


def test_a_rank_that_never_came_and_an_orphan(tmp_path, monkeypatch):
    assert _describe(3, None, True) == "rank 3 never came as far as the first step"
    orphaned = threading.Event()
    watch = Watch(World(0, 2), HashStore(), 1.0, tmp_path / "s.txt", pytest.fail, orphaned.set, leave=pytest.fail)
    with watch:
        monkeypatch.setattr("os.getppid", lambda: 1)
        watch.beat(1, "saving")
        assert orphaned.wait(5)

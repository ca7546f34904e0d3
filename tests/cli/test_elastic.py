"""The launcher's exit status, and what it says; real launches are in tests/distributed/test_launched.py."""

import json
import signal
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from mmcli import elastic
from mmcli.launch import Launch
from mmcore.errors import ConfigError
from tests.helpers.ranks import free_port


def result(*failures):
    """Of (rank, exit code, when); the process of rank n is 100 + n."""
    found = {
        rank: SimpleNamespace(
            pid=100 + rank, exitcode=code, timestamp=when, message="because", signal_name=lambda: "SIGKILL"
        )
        for rank, code, when in failures
    }
    return SimpleNamespace(failures=found, is_failed=lambda: bool(found))


@pytest.mark.parametrize(
    ("failures", "asked", "status"),
    [
        ([], None, 0),
        ([], signal.SIGTERM, 0),  # the last step was done before the signal
        ([(0, 75, 5), (1, 75, 5)], signal.SIGTERM, 75),
        ([(1, 75, 5), (0, 75, 6)], None, 75),  # the signal went to a rank
        ([(0, 130, 5), (1, 130, 5)], signal.SIGINT, 130),
        ([(0, -15, 5)], signal.SIGTERM, 75),  # still starting: nothing to save
        ([(0, -2, 5)], signal.SIGINT, 130),
        ([(0, 2, 5), (1, -15, 9)], None, 2),
        ([(0, 1, 6), (1, -9, 5)], None, 1),
        ([(0, 1, 6), (1, -9, 5)], signal.SIGTERM, 75),
        ([(0, 1, 5)], signal.SIGTERM, 1),  # it failed while saving
        ([(0, 3, 5)], None, 1),
    ],
)
def test_the_exit_status_is_that_of_the_rank_that_ended_first(failures, asked, status):
    assert elastic.status_of(result(*failures), asked) == status


@pytest.mark.parametrize(
    ("failures", "left", "line"),
    [
        ([(1, -9, 5), (0, 1, 6)], 3, "mm: rank 1 was killed by SIGKILL; starting all ranks again from the newest checkpoint (may do so 2 more times)\n"),
        ([(1, -9, 5)], 0, "mm: rank 1 was killed by SIGKILL\n"),
        ([(1, 2, 5)], 0, "mm: rank 1 ended with status 2: because\n"),
        ([(0, 2, 5)], 0, ""),  # rank 0 has said it
        ([(1, 75, 5)], 0, ""),
        ([(0, 1, 5)], 0, "mm: rank 0 ended with status 1\n"),
    ],
)
def test_one_line_says_what_rank_0_could_not(failures, left, line, capsys):
    agent = elastic.Agent.__new__(elastic.Agent)
    agent._remaining_restarts = left
    agent._say(result(*failures))
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("failures", "ended", "first"),
    [
        ([(0, 1, 5), (1, 1, 6)], [], 0),
        ([(0, 1, 6), (1, 1, 5)], [], 1),
        ([(0, 1, 5), (1, -9, 7)], [], 1),  # 0 lost its connection to 1, whose death was seen late
        ([(0, 1, 5), (1, -7, 7), (2, 1, 6)], [], 1),
        ([(0, -9, 7), (1, -11, 6), (2, 1, 5)], [], 1),
        ([(0, 1, 5), (1, -9, 7)], [(101, 15)], 1),  # it was ending when torchrun turned to it
        ([(0, 1, 5), (1, -6, 7)], [], 0),  # NCCL's way of losing a connection
        ([(0, 75, 5), (1, -11, 6)], [], 0),
        ([(0, -9, 5), (1, 1, 5)], [(100, 9)], 1),  # 0 stood still, 1 told it, the launcher killed 0
        ([(0, -9, 5), (1, 1, 5)], [(100, 9), (100, 15)], 1),  # and torchrun found it not quite gone
        ([(0, -15, 5), (1, 1, 5), (2, -15, 5)], [(100, 15), (102, 15)], 1),
        ([(0, -9, 35), (1, 1, 5)], [(100, 15), (100, 9)], 1),  # no answer to SIGTERM
        ([(0, -11, 5), (1, 1, 5)], [(100, 15)], 1),  # an accident on its way out
        ([(0, -15, 5), (1, -9, 7), (2, 1, 4)], [(100, 15)], 1),
    ],
)
def test_a_rank_that_was_killed_comes_first_unless_the_launcher_did_it(failures, ended, first):
    found = result(*failures)
    found.failures = elastic.own_failures(found.failures, set(ended))
    assert elastic.first_rank(found) == first


def test_whom_torchrun_ends_is_noted(tmp_path):
    """Real processes: one fails, one is killed, one goes on until torchrun ends it."""
    agent = elastic.Agent.__new__(elastic.Agent)
    agent._ended = {(1, signal.SIGKILL)}  # of an earlier start
    scripts = ("raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)", "import time; time.sleep(60)")
    agent._pcontext = start_processes(
        "mm", sys.executable, {rank: ("-c", script) for rank, script in enumerate(scripts)}, dict.fromkeys(range(3), {}),
        DefaultLogsSpecs(log_dir=str(tmp_path)),
    )  # fmt: skip
    agent._note_ends()
    failed, killed, ended = agent._processes()
    failed.wait(30)
    killed.wait(30)
    found = agent._pcontext.wait(0)
    assert found.failures.keys() == {0, 1, 2} and agent._ended == {(ended.pid, signal.SIGTERM)}
    assert elastic.own_failures(found.failures, agent._ended).keys() == {0, 1}


@pytest.fixture
def launcher(monkeypatch):
    """`run` for one of two nodes, in this process."""
    before = {number: signal.getsignal(number) for number in elastic.FORWARDED}
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGQUIT")
    monkeypatch.setattr(elastic, "JOIN_SECONDS", 1)
    monkeypatch.setattr(elastic, "SILENT_SECONDS", 0.5)
    yield lambda port: elastic.run([json.dumps(asdict(Launch(1, True, nodes=2, rdzv=f"127.0.0.1:{port}"))), "--version"])
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
def test_a_node_that_does_not_come_is_waited_for_aloud_and_then_named(launcher, capfd):
    assert launcher(free_port()) == 1
    assert capfd.readouterr().err.splitlines() == [
        "mm: waiting for 1 of 2 nodes",
        "mm: 1 of 2 nodes did not come within 1 s: start the same command on every node, with --resume",
    ]


def test_a_meeting_place_that_is_lost_is_one_sentence(launcher, monkeypatch, capfd):
    def lose(self, worker_group):
        raise RendezvousConnectionError("The connection to the C10d store has failed. See inner exception for details.")

    monkeypatch.setattr(elastic.LocalElasticAgent, "_rendezvous", lose)
    port = free_port()
    assert launcher(port) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"mm: the launchers of 2 nodes do not meet, or no longer, at 127.0.0.1:{port} (The connection to the C10d")


@pytest.mark.parametrize("ranks", [(1, 1), (1, 2)])
def test_nodes_with_other_numbers_of_ranks_are_told_so(ranks):
    store = HashStore()
    for node, count in enumerate(ranks):
        store.set(f"mm-ranks/{node}", str(count))
    agent = elastic.Agent.__new__(elastic.Agent)
    group = SimpleNamespace(store=store, group_rank=0, group_world_size=2, spec=SimpleNamespace(local_world_size=ranks[0]))
    if len(set(ranks)) == 1:
        agent._check_equal(group)
        return
    with pytest.raises(ConfigError, match="the nodes have 1, 2 ranks: give the same --gpus or --ranks on every node"):
        agent._check_equal(group)

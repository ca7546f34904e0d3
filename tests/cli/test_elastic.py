"""The launcher's exit status, and what it says; real launches are in tests/distributed/test_launched.py."""

import signal
from types import SimpleNamespace

import pytest

from mmcli import elastic


def result(*failures):
    """Of (rank, exit code, when)."""
    found = {
        rank: SimpleNamespace(exitcode=code, timestamp=when, message="because", signal_name=lambda: "SIGKILL")
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

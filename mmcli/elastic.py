"""torchrun's agent for the ranks of one node: `python -m mmcli.elastic LAUNCH COMMAND...`, called by launch.py.

It is PyTorch's LocalElasticAgent (rendezvous, watching, restarts) with what a training run asks for beyond it:

- A signal to the launcher is handed on to every rank, and they decide together when to stop. torchrun would tear the
  ranks down and kill what is left after 30 s, which is not enough to save a large model.
- A run that was stopped, or a mistake of the user's, is not started again, and its exit status reaches the shell.
- A stopped process (SIGSTOP) hears no SIGTERM: once another rank has failed it is killed at once, not after 30 s.
- Who waits for other nodes says so, and a node that does not come or is lost is one sentence.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

import psutil

from mmcli.launch import REQUEUE, Launch
from mmcore.errors import ConfigError, HardwareError, MMError

_LOUD = "LOGLEVEL" in os.environ
_CPP_UNSET = "TORCH_CPP_LOG_LEVEL" not in os.environ
if not _LOUD:  # the agent's own lines would break into the live view
    os.environ["LOGLEVEL"] = "CRITICAL"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost node is 20 lines of a C++ stack otherwise
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

from torch.distributed import DistError  # noqa: E402
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState  # noqa: E402
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent  # noqa: E402
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure  # noqa: E402
from torch.distributed.elastic.rendezvous import (  # noqa: E402
    RendezvousError,
    RendezvousParameters,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler  # noqa: E402

if not _LOUD:
    del os.environ["LOGLEVEL"]
    if _CPP_UNSET:
        del os.environ["TORCH_CPP_LOG_LEVEL"]

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
FINAL = (2, REQUEUE, 128 + signal.SIGINT)
"""Exit statuses that starting again would not change: a user's mistake, a run that was asked to stop."""


JOIN_SECONDS = 600
"""How long a node waits for the others."""
SILENT_SECONDS = 10.0
"""How long it does so without a word."""
TOGETHER = "start the same command on every node, with --resume"
LEAVING_SECONDS = 20.0
"""How long the ranks of a run that ends may follow one another."""


class Agent(LocalElasticAgent):
    """Starts, watches and restarts this node's ranks."""

    def __init__(self, spec: WorkerSpec, **settings) -> None:
        super().__init__(spec, **settings)
        self.asked: signal.Signals | None = None
        """The signal that asks the run to stop."""
        self._told: set[int] = set()
        self._ended: set[tuple[int, int]] = set()
        """The processes of this start that the launcher has ended, each with a signal that it sent."""
        self._first_left: float | None = None
        self._starts = 0

    def forward(self, number: int, _frame: object) -> None:
        """The handler of FORWARDED: every rank gets the signal; where none runs, the launcher ends."""
        self.asked = signal.Signals(number)
        if not any(process.poll() is None for process in self._processes()):
            raise SignalException(f"{self.asked.name} while no rank was running", self.asked)
        self._told.clear()
        self._tell_ranks()

    def _processes(self) -> list:
        return [handler.proc for handler in self._pcontext.subprocess_handlers.values()] if self._pcontext else []

    def _tell_ranks(self) -> None:
        for process in self._processes():
            if process.pid not in self._told and process.poll() is None:
                self._told.add(process.pid)
                process.send_signal(self.asked)

    def _start_workers(self, worker_group: WorkerGroup) -> dict:
        if self.asked is not None:
            raise SignalException(f"{self.asked.name} before the ranks were started", self.asked)
        self._check_equal(worker_group)
        self._name_start(worker_group)
        started = super()._start_workers(worker_group)
        self._note_ends()
        return started

    def _note_ends(self) -> None:
        """Have noted whom torchrun ends once a rank has failed: its result does not tell them from those that failed."""
        self._ended.clear()
        for handler in self._pcontext.subprocess_handlers.values():
            handler.close = functools.partial(self._end, handler.proc.pid, handler.close)

    def _end(self, pid: int, close: Callable[..., None], death_sig: signal.Signals) -> None:
        self._ended.add((pid, death_sig))
        close(death_sig=death_sig)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Wait for the other nodes, and say so where that takes a while. Raises HardwareError where they do not come."""
        timer = threading.Timer(SILENT_SECONDS, lambda: say(f"waiting for {self._missing()}"))
        timer.daemon = True
        timer.start()
        try:
            super()._rendezvous(worker_group)
        except RendezvousTimeoutError:
            raise HardwareError(f"{self._missing()} did not come within {JOIN_SECONDS} s: {TOGETHER}") from None
        finally:
            timer.cancel()

    def _missing(self) -> str:
        """The nodes that have not come yet."""
        handler = self._worker_group.spec.rdzv_handler
        nodes = handler._settings.max_nodes
        here = sum(node != handler._this_node for node in handler._state_holder.state.participants)
        return f"{max(1, nodes - 1 - here)} of {nodes} nodes"

    def _check_equal(self, worker_group: WorkerGroup) -> None:
        """Raise ConfigError, on every node, where they have not equally many ranks."""
        store, own = worker_group.store, worker_group.spec.local_world_size
        store.set(f"mm-ranks/{worker_group.group_rank}", str(own))
        ranks = [int(store.get(f"mm-ranks/{node}")) for node in range(worker_group.group_world_size)]
        if len(set(ranks)) > 1:
            raise ConfigError(
                f"the nodes have {', '.join(map(str, ranks))} ranks: give the same --gpus or --ranks on every node"
            )

    def _name_start(self, worker_group: WorkerGroup) -> None:
        """Let the ranks of all nodes know a name for this start, and whether there was one before.

        The store that they meet in is that of the last start, with its old entries; and where another node's rank has
        failed, torchrun starts this node's again without counting it.
        """
        store, node = worker_group.store, worker_group.group_rank  # a store of this rendezvous alone
        store.set(f"mm-starts/{node}", str(self._starts))
        starts = [int(store.get(f"mm-starts/{other}")) for other in range(worker_group.group_world_size)]
        if node == 0:
            store.set("mm-start", uuid.uuid4().hex)
        os.environ["MM_START"] = store.get("mm-start").decode()
        os.environ["MM_STARTS_BEFORE"] = str(max(starts))
        self._starts += 1

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if self.asked is not None:
            self._tell_ranks()  # those that were being started when the signal came
        codes = [process.poll() for process in self._processes()]
        if any(code in FINAL for code in codes) and None in codes and self._may_still_leave():
            return RunResult(state=WorkerState.HEALTHY)
        if any(codes):
            self._kill_stopped()
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            result.failures = own_failures(result.failures, self._ended)
            if self.asked is not None or first_failure(result).exitcode in FINAL:
                self._remaining_restarts = 0
            self._say(result)
        return result

    def _may_still_leave(self) -> bool:
        """Ranks that end together do not end at the very same time; those still at it are not disturbed."""
        self._first_left = self._first_left or time.monotonic()
        return time.monotonic() - self._first_left < LEAVING_SECONDS

    def _kill_stopped(self) -> None:
        for process in self._processes():
            if process.poll() is None and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
                self._ended.add((process.pid, signal.SIGKILL))
                process.kill()

    def _say(self, result: RunResult) -> None:
        """One line on a failure that its rank could not tell the terminal, and what happens now."""
        rank, failure = first_rank(result), first_failure(result)
        if failure.exitcode in FINAL and (rank == 0 or failure.exitcode != 2):
            return  # rank 0 has said it
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with status {failure.exitcode}"
        told = rank == 0 or failure.exitcode < 0 or "<N/A>" in str(failure.message)
        why = "" if told else f": {failure.message}"
        left = self._remaining_restarts
        then = f"; starting all ranks again from the newest checkpoint (may do so {left - 1} more times)" if left else ""
        say(f"rank {rank} {how}{why}{then}")


def say(sentence: str) -> None:
    print(f"mm: {sentence}", file=sys.stderr, flush=True)


def own_failures(failures: Mapping[int, ProcessFailure], ended: set[tuple[int, int]]) -> dict[int, ProcessFailure]:
    """`failures` without the deaths that the launcher caused; `ended`: the processes that it ended, and with which signals.

    A rank that was sent SIGTERM may die of another signal on its way out. A SIGKILL that the launcher did not send came
    before, however: the system takes a while to end a process that holds a GPU's memory, and others fail meanwhile.
    """

    def by_launcher(failure: ProcessFailure) -> bool:
        told, killed = ((failure.pid, number) in ended for number in (signal.SIGTERM, signal.SIGKILL))
        return failure.exitcode < 0 and (killed or (told and failure.exitcode != -signal.SIGKILL))

    return {rank: failure for rank, failure in failures.items() if not by_launcher(failure)}


def first_rank(result: RunResult) -> int:
    """The rank that failed first; the others followed it.

    A rank that a signal killed cannot write when: its time is that at which the launcher saw it, and by then the others may
    have written that they lost the connection to it. So it comes before them, unless it died of SIGABRT, with which NCCL
    ends a rank that lost a connection.
    """
    failures = result.failures

    def when(rank: int) -> int:
        return failures[rank].timestamp

    first = min(failures, key=when)
    if failures[first].exitcode in FINAL:  # it ended for a reason of its own, not for a lost connection
        return first
    killed = [rank for rank, failure in failures.items() if failure.exitcode < 0 and failure.exitcode != -signal.SIGABRT]
    return min(killed or failures, key=when)


def first_failure(result: RunResult) -> ProcessFailure:
    return result.failures[first_rank(result)]


def status_of(result: RunResult, asked: signal.Signals | None) -> int:
    """The launcher's exit status."""
    if not result.is_failed():
        return 0
    code = first_failure(result).exitcode
    if asked is not None and code < 0:  # a rank that was still starting, and had nothing to save, died of it
        return stopped_status(asked)
    return code if code in FINAL else 1


def stopped_status(asked: signal.Signals) -> int:
    """130 after Ctrl-C, else the status that asks a scheduler to run the job again."""
    return 128 + signal.SIGINT if asked == signal.SIGINT else REQUEUE


def make_agent(launch: Launch, words: Sequence[str], folder: str) -> Agent:
    """The agent for `mm <words>` on this node; ranks leave the reason of a failure in `folder`."""
    alone = launch.nodes == 1
    job = os.environ.get("SLURM_JOB_ID", "mm") + "." + os.environ.get("SLURM_RESTART_COUNT", "0")
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=launch.rdzv or "localhost:0",
        run_id=uuid.uuid4().hex if alone else job,
        min_nodes=launch.nodes,
        max_nodes=launch.nodes,
        local_addr="localhost" if alone else None,
        join_timeout=JOIN_SECONDS,
    )
    spec = WorkerSpec(
        role="mm",
        local_world_size=launch.per_node,
        entrypoint=sys.executable,
        args=("-u", "-m", "mmcli", *words),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=launch.max_restarts,
        monitor_interval=0.2,
        local_addr="localhost" if alone else None,
    )
    return Agent(spec, logs_specs=DefaultLogsSpecs(log_dir=folder))


def run(arguments: Sequence[str]) -> int:
    """Start the ranks and see them through; the exit status."""
    launch, words = Launch(**json.loads(arguments[0])), arguments[1:]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are forwarded; nohup's SIGHUP stays ignored
    with tempfile.TemporaryDirectory(prefix="mm-ranks-") as folder:
        handler = None
        try:
            agent = make_agent(launch, words, folder)
            handler = agent._worker_group.spec.rdzv_handler
            for number in FORWARDED:
                signal.signal(number, agent.forward)
            return status_of(agent.run(), agent.asked)
        except SignalException as stopped:
            return stopped_status(signal.Signals(stopped.sigval))
        except MMError as error:
            say(str(error))
            return 2 if isinstance(error, ConfigError) else 1
        except (RendezvousError, DistError) as error:
            say(lost(launch, error))
            return 1
        finally:
            if handler is not None:
                handler.shutdown()


def lost(launch: Launch, error: Exception) -> str:
    """One sentence on launchers that did not find, or have lost, one another."""
    first = " ".join(str(error).split()).split(". ")[0]
    return (
        f"the launchers of {launch.nodes} nodes do not meet, or no longer, at {launch.rdzv or 'localhost'} ({first}): see "
        f"what the one there said and whether its port can be reached, then {TOGETHER}"
    )


def main() -> None:
    """Run, and give the terminal back as it was: a rank that was killed could not."""
    terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        import termios

        before = termios.tcgetattr(sys.stdin)
    status = run(sys.argv[1:])
    if terminal:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        print("\x1b[?25h", end="", flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()

"""A run of several processes: which the command line asks for, the hand-over to torchrun, and what each rank does
with its output.

`mm pretrain RECIPE --gpus 8` replaces itself by elastic.py, torchrun's agent, which starts the same command once for
each rank, without those options. A process that torchrun started itself (`torchrun ... -m mmcli pretrain RECIPE`) is
a rank like any other. No torch here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

import typer

from mmcore import processors
from mmcore.errors import NO_ROOM, ConfigError, MMError

REQUEUE = 75
"""Exit status (EX_TEMPFAIL) of a run that SIGTERM, SIGUSR1 or SIGUSR2 stopped after it was saved: run it again."""
RESTARTS = 3
"""How often ranks are started again after a failure, where --max-restarts does not say."""
GO_ON = "MM_GO_ON"
"""The environment variable that tells a rank the command which its user gave."""

GpusOption = Annotated[
    str | None,
    typer.Option("--gpus", metavar="N", help="Train on N GPUs of each node; 0: on the CPU."),
]
RanksOption = Annotated[
    int | None, typer.Option("--ranks", metavar="N", help="With --gpus 0: train with N processes on the CPU.")
]
NodesOption = Annotated[int | None, typer.Option("--nodes", metavar="N", help="Train on N nodes; run this on each.")]
RdzvOption = Annotated[
    str | None, typer.Option("--rdzv", metavar="HOST:PORT", help="Where the nodes meet: one of them and a free port.")
]
RestartsOption = Annotated[
    int | None,
    typer.Option("--max-restarts", metavar="N", help=f"After a failure start again, at most N times ({RESTARTS})."),
]


@dataclass(frozen=True)
class Launch:
    """The processes to start."""

    per_node: int
    on_cpu: bool
    nodes: int = 1
    rdzv: str | None = None
    max_restarts: int = RESTARTS

    @property
    def device(self) -> str:
        return "cpu" if self.on_cpu else "cuda"

    def words(self) -> list[str]:
        """The options that ask for it."""
        words = ["--gpus", "0", "--ranks", str(self.per_node)] if self.on_cpu else ["--gpus", str(self.per_node)]
        if self.nodes > 1:
            words += ["--nodes", str(self.nodes)]
        if self.rdzv:
            words += ["--rdzv", self.rdzv]
        return words if self.max_restarts == RESTARTS else [*words, "--max-restarts", str(self.max_restarts)]


def read_launch(
    gpus: str | None, ranks: int | None, nodes: int | None, rdzv: str | None, max_restarts: int | None
) -> Launch | None:
    """What the options ask for; None where none is given. Raises ConfigError."""
    from mmcore.config.words import whole_number

    if all(option is None for option in (gpus, ranks, nodes, rdzv, max_restarts)):
        return None
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "this process was started by torchrun already (WORLD_SIZE is set): leave out --gpus, --ranks, --nodes, "
            "--rdzv and --max-restarts, or unset WORLD_SIZE"
        )
    if gpus is None:
        what = "--ranks goes with --gpus 0" if ranks is not None else "say how many GPUs each node has"
        raise ConfigError(f"{what}: add --gpus {0 if ranks is not None else 'N'}")
    per_node = whole_number(gpus)
    if per_node is None:
        raise ConfigError(f"--gpus {gpus}: give the number of GPUs of a node to train on, or add --plan to `mm pretrain`")
    on_cpu = per_node == 0
    if ranks is not None and not on_cpu:
        raise ConfigError(f"--ranks goes with --gpus 0: on GPUs every one of the {gpus} has one process")
    for option, value, least in (("--ranks", ranks, 1), ("--nodes", nodes, 1), ("--max-restarts", max_restarts, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{option} is {value}: it must be at least {least}")
    return Launch(
        per_node=(ranks or 1) if on_cpu else per_node,
        on_cpu=on_cpu,
        nodes=nodes or 1,
        rdzv=_meeting_point(rdzv, nodes or 1),
        max_restarts=RESTARTS if max_restarts is None else max_restarts,
    )


def _meeting_point(rdzv: str | None, nodes: int) -> str | None:
    if rdzv is None and nodes > 1:
        raise ConfigError(f"--nodes {nodes} needs a place to meet: add --rdzv HOST:PORT, the same on every node")
    if rdzv is not None and not re.fullmatch(r"\S+:\d{1,5}", rdzv):
        raise ConfigError(f"--rdzv {rdzv}: write it as HOST:PORT, such as node01:29500")
    if rdzv is not None and not 1 <= int(rdzv.rpartition(":")[2]) <= 65_535:
        raise ConfigError(f"--rdzv {rdzv}: the port must lie between 1 and 65535")
    return rdzv


def hand_over(launch: Launch, words: Sequence[str], go_on: str) -> NoReturn:
    """Become torchrun's agent for `mm <words>`. go_on: the command that resumes the run, for its user."""
    environment = os.environ | {GO_ON: go_on}
    processors.share(environment, launch.per_node)
    device = ["--set", f"training.device={launch.device}"]
    command = [sys.executable, "-m", "mmcli.elastic", json.dumps(asdict(launch)), *words, *device]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


@dataclass(frozen=True)
class Rank:
    """This process among those that train together, as torchrun's environment says."""

    rank: int = 0
    size: int = 1
    restarts: int = 0
    """How often the ranks have been started before."""

    @classmethod
    def here(cls) -> Rank:
        rank, size, counted, told = (
            int(os.environ.get(name, default)) for name, default in
            (("RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "0"), ("MM_STARTS_BEFORE", "0"))
        )  # fmt: skip
        return cls(rank, size, max(counted, told))

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process."""
        return "TORCHELASTIC_RUN_ID" in os.environ


def begun_since_launch(run_folder: Path) -> bool:
    """Whether the run folder was written since the launcher began: then ranks that are started again must not
    --overwrite what they wrote before."""
    import psutil

    try:
        written = json.loads((run_folder / "environment.json").read_text(encoding="utf-8"))["started"]
        began = datetime.strptime(written, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return began >= int(psutil.Process(os.getppid()).create_time())


def log_path(run_folder: Path, rank: int) -> Path:
    return run_folder / "logs" / f"rank-{rank:05d}.log"


def open_log(run_folder: Path, here: Rank) -> TextIO:
    """This rank's log, for text to be appended, with a line that says when and where it began.

    All but rank 0 write their standard output and errors there from now on, whoever writes them.
    """
    from mmcore.training.run_folder import disk_errors

    path = log_path(run_folder, here.rank)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", encoding="utf-8", buffering=1)
    began = time.strftime("%Y-%m-%d %H:%M:%S%z")
    host = os.uname().nodename
    print(f"--- {began} rank {here.rank} of {here.size}, pid {os.getpid()} on {host}, start {here.restarts + 1}", file=log)
    faulthandler.enable(log)
    if here.rank:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return log


@contextlib.contextmanager
def failures_to(log: TextIO, here: Rank) -> Iterator[None]:
    """Put the traceback of a failure of ours into the log, and one line on it on rank 0's terminal: where one rank
    fails the others follow, each with a traceback of what it was waiting for. Leaves with status 1."""
    try:
        yield
    except MMError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise  # there is no room for a traceback, and nobody needs one
        traceback.print_exc(file=log)
        sentence = f"{' '.join(f'{type(error).__name__}: {error}'.split())}; the traceback is in {log.name}"
        report_failure(sentence)
        if here.rank == 0:
            print(f"mm: rank 0: {sentence}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from None


def report_failure(text: str) -> None:
    """Leave `text` for the launcher, which shows it where this rank has no terminal. Outside torchrun: nothing.

    Whole or absent: torchrun's agent fails on half of such a file, and ranks are killed while they write.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        part = Path(f"{path}.part")
        part.write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")
        part.replace(path)

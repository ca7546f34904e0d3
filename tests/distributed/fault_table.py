"""Hurts real runs of several ranks, again and again, and prints what became of them.

    python -m tests.distributed.fault_table [--kills 100] [--times 5] [--ranks 2] [--json FILE] [--only NAME ...]
    python -m tests.distributed.fault_table --json FILE --show     the rows of the file as the table of docs/faults.md

Every trial is a run of a tiny model that is hurt once or more, goes on (started again by its launcher, or with
--resume), and must end with the losses, weights and moments of the unbroken run on as many ranks, to the last bit.
Where the fault leaves samples out on purpose (skip, roll-back), it must end with finite weights and know what it left
out. Work lost: updates that were made and had to be made again, or whose samples were left out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.benchmarks.common import environment
from tests.distributed.checkpoint_faults import FAULTS, VICTIM, CheckpointFault, enlarge, newest_checkpoint, small_disk
from tests.distributed.launched import Run, prepare, same_end, tensors

STEPS, EVERY, BATCH = 60, 5, 4
TIMEOUT = 15.0
"""Seconds within which ranks must name one that hangs. A busy machine needs more, where that is not what is tried."""
PATIENCE = 900.0
"""Seconds that a trial waits for its run."""


@dataclass
class Row:
    fault: str
    tried: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)
    """Steps, of each fault."""
    problems: list[str] = field(default_factory=list)

    def line(self) -> str:
        mean, most = (f"{statistics.mean(self.lost):.1f}", str(max(self.lost))) if self.lost else ("-", "-")
        return f"{self.fault:<58} {self.tried:>5} {self.survived:>8} {mean:>10} {most:>5}"


class Table:
    """The unbroken run, and the folders of those that are hurt."""

    def __init__(self, base: Path, ranks: int, seed: int, timeout: float = TIMEOUT):
        self.base, self.ranks, self.draw, self.timeout = base, ranks, random.Random(seed), timeout
        self.runs: list[Run] = []
        self.stops: list[Path] = []
        self.unbroken = self.folder("unbroken")
        run = Run(self.unbroken, ranks=ranks)
        if run.wait(PATIENCE) != 0:
            raise SystemExit(f"the unbroken run failed:\n{run.said()}")

    def folder(self, name: str, **training) -> Path:
        """A recipe in a folder of its own, all on the same text."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.base))
        prepare(folder, self.base, every=EVERY, distributed={"timeout_seconds": self.timeout}, steps=STEPS, validation_every=20,
                batch_size=BATCH, **training)  # fmt: skip
        return folder

    def run(self, folder: Path, **settings) -> Run:
        self.runs.append(Run(folder, "--resume", ranks=self.ranks, **settings))
        return self.runs[-1]

    def stopped(self, number: int) -> Path:
        """A copy of the `number`-th run that was stopped at a random step, counted from 1."""
        while len(self.stops) < number:
            folder = self.folder("stopped")
            run = self.run(folder)
            run.wait_for_step(self.draw.randrange(2 * EVERY + 1, STEPS - 15), seconds=PATIENCE)
            run.signal(signal.SIGTERM)
            assert run.wait(PATIENCE) == 75, run.said()
            self.stops.append(folder)
        copy = self.folder("checkpoint")
        shutil.copytree(self.stops[number - 1] / "run", copy / "run")
        return copy

    def end_runs(self) -> None:
        """Leave nothing running of a trial that failed."""
        for run in self.runs:
            run.end()
        self.runs.clear()

    def ends_right(self, row: Row, folder: Path, run: Run) -> bool:
        """Whether the run has ended, and like the unbroken one; a problem is noted."""
        if run.wait(PATIENCE) != 0:
            row.problems.append(f"{folder.name}: ended with {run.process.returncode}: {run.said()[-800:]}")
        elif not same_end(folder, self.unbroken, STEPS):
            row.problems.append(f"{folder.name}: ended with other losses or weights than the unbroken run")
        else:
            return True
        return False


def lost_by(run: Run, newest: int, since: int = -1) -> int:
    """Steps between what was reached when the fault came and where the run went on: in its last start, or in the first
    one after `since` starts that came so far."""
    went_on = [re.search(r"parameters on .*?(?:from step (\d+) on)?$", text, re.MULTILINE) for text in starts_of(run)[since:]]
    first = next((found for found in went_on if found), None)
    return max(0, newest - int(first[1] or 0)) if first else 0


def starts_of(run: Run) -> list[str]:
    """What rank 0 has said, a text for each start."""
    return re.split(r"^--- .* rank 0 of", run._log(0), flags=re.MULTILINE)[1:]


def random_kills(table: Table, kills: int) -> Iterator[Row]:
    """SIGKILL of a random rank at a random moment while it trains or saves; after one in four, again while it starts."""
    row = Row("SIGKILL of one rank, at a random moment (launcher restarts)")
    while row.tried < kills:
        folder = table.folder("kill")
        run, struck = table.run(folder, restarts=1000), []
        while row.tried + len(struck) < kills and run.process.poll() is None:
            struck += strike(table, run, 6)
            if struck and row.tried + len(struck) < kills and table.draw.random() < 0.25:
                struck += strike(table, run, 3)
            wait_until_it_trains(run)
        row.tried += len(struck)
        row.survived += len(struck) if table.ends_right(row, folder, run) else 0
        row.lost += [lost_by(run, newest, since) for newest, since in struck]
        yield row


def strike(table: Table, run: Run, seconds: float) -> list[tuple[int, int]]:
    """Kill a rank at a moment of the next `seconds`, and wait until all have been started again: (newest step of those
    that were killed, their number of starts), or nothing where nothing was running."""
    moment = time.monotonic() + table.draw.uniform(0, seconds)
    while time.monotonic() < moment and run.process.poll() is None:
        time.sleep(0.005)
    since = run._starts()
    if since == 0 or run.process.poll() is not None:
        return []
    newest = run.newest_step() if "parameters on" in starts_of(run)[-1] else 0  # metrics of an earlier start are no work of this
    try:
        run.signal(signal.SIGKILL, rank=table.draw.randrange(table.ranks))
    except ProcessLookupError:
        return []
    while run.process.poll() is None and run._starts() == since:
        time.sleep(0.02)
    return [(newest, since)]


def wait_until_it_trains(run: Run, since: int = 0) -> None:
    """Until the ranks that were started last, after `since` starts, have said where they go on."""
    while run.process.poll() is None:
        said = starts_of(run)
        if len(said) > since and "parameters on" in said[-1]:
            return
        time.sleep(0.02)


def trials(name: str, times: int, trial: Callable[[Table, Row], tuple[bool, int]]) -> Callable[[Table], Iterator[Row]]:
    """One trial after another; each says whether it was survived, and the work it lost."""

    def rows(table: Table) -> Iterator[Row]:
        row = Row(name)
        for _ in range(times):
            row.tried += 1
            try:
                survived, lost = trial(table, row)
                row.survived += survived
                row.lost.append(lost)
            except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
                row.problems.append(f"{type(error).__name__}: {str(error)[-800:]}")
            table.end_runs()
            yield row

    return rows


def asked_to_stop(number: signal.Signals, rank: int | None, status: int = 75):
    def trial(table: Table, row: Row) -> tuple[bool, int]:
        folder = table.folder("stop")
        run = table.run(folder)
        run.wait_for_step(table.draw.randrange(2, STEPS - 15), seconds=PATIENCE)
        run.signal(number, rank)
        left = run.wait(PATIENCE)
        newest = run.newest_step()
        again = table.run(folder)
        right = table.ends_right(row, folder, again)
        return right and left == status, lost_by(again, newest)

    return trial


def launcher_killed(table: Table, row: Row) -> tuple[bool, int]:
    """The ranks are left alone: they save and leave."""
    folder = table.folder("orphans")
    run = table.run(folder)
    run.wait_for_step(table.draw.randrange(2, STEPS - 15), seconds=PATIENCE)
    run.signal(signal.SIGKILL)
    run.process.wait(60)
    end = time.monotonic() + 120
    while "stopped at step" not in run.said() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.0)
    newest = run.newest_step()
    again = table.run(folder)
    return table.ends_right(row, folder, again), lost_by(again, newest)


def frozen(table: Table, row: Row) -> tuple[bool, int]:
    """SIGSTOP: the others name it within the timeout, and the launcher starts all again."""
    folder, rank = table.folder("frozen"), table.draw.randrange(table.ranks)
    run = table.run(folder)
    newest, since, began = run.wait_for_step(table.draw.randrange(2, STEPS - 15), seconds=PATIENCE), run._starts(), time.monotonic()
    run.signal(signal.SIGSTOP, rank)
    wait_until_it_trains(run, since)
    took = time.monotonic() - began
    named = f"rank {rank} (pid" in run.said() and "does not answer (its process is stopped)" in run.said()
    if not named:
        row.problems.append(f"{folder.name}: rank {rank} was not named within {took:.0f} s")
    return table.ends_right(row, folder, run) and named, lost_by(run, newest)


def injected(kind: str, named: str, **training):
    """A fault from within one rank, once; the run must say what happened, and end right after a restart or --resume."""

    def trial(table: Table, row: Row) -> tuple[bool, int]:
        folder, step = table.folder(kind, **training), table.draw.randrange(12, STEPS - 10)
        rank = table.draw.randrange(table.ranks)
        run = table.run(folder, restarts=2, fault=f"{kind}:{rank}:{step}")
        if training:  # the run goes on by itself, on purpose not as the unbroken one
            status = run.wait(PATIENCE)
            assert status == 0 and named.format(rank=rank) in run.said(), f"{folder.name}: ended with {status}: {run.said()}"
            return True, steps_left_out(folder)
        run.wait(PATIENCE)
        if named.format(rank=rank) not in run.said() + run._log(rank):
            row.problems.append(f"{folder.name}: it did not say {named.format(rank=rank)!r}: {run.said()[-800:]}")
            return False, 0
        newest = step - 1
        if run.process.returncode != 0:
            run = table.run(folder)
        return table.ends_right(row, folder, run), lost_by(run, newest)

    return trial


def steps_left_out(folder: Path) -> int:
    """Steps' worth of samples that the end's weights have not seen; there must be some, and the weights finite."""
    last = folder / "run" / "checkpoints" / f"step-{STEPS:06d}"
    assert all(bool(torch.isfinite(t).all()) for t in tensors(last).values()), f"{last} is not finite"
    left_out = json.loads((last / "trainer.json").read_text())["faults"]["left_out"]
    assert left_out, f"{last} knows of nothing that was left out"
    return sum(stop - first for first, stop in left_out) // BATCH


def struck(fault: CheckpointFault):
    """A fault of the newest checkpoint, between a stop and the resumption, which must say what it passed over."""

    def trial(table: Table, row: Row) -> tuple[bool, int]:
        folder = table.stopped(row.tried)
        before = int(newest_checkpoint(folder / "run").name.removeprefix("step-"))
        fault.cause(folder / "run")
        again = table.run(folder)
        right = table.ends_right(row, folder, again)
        said = fault.said is None or fault.said in again.said()
        if not said:
            row.problems.append(f"{folder.name}: it did not say {fault.said!r}: {again.said()[-800:]}")
        return right and said and not (folder / "run" / VICTIM).exists(), lost_by(again, before)

    return trial


def filled_disk(table: Table, row: Row) -> tuple[bool, int]:
    """The run's folder is a small file system, which fills; the run ends with a sentence, and goes on once there is room."""
    folder = table.folder("full")
    with small_disk(folder / "run", "1840k") as disk:
        run = table.run(folder)
        left, said = run.wait(PATIENCE), run.said()
        if left == 0 or "the disk is full" not in said:
            row.problems.append(f"{folder.name}: ended with {left}, and not for want of room: {said[-800:]}")
            return False, 0
        newest = run.newest_step()
        enlarge(disk, "64m")
        again = table.run(folder)
        return table.ends_right(row, folder, again), lost_by(again, newest)


def faults(kills: int, times: int) -> dict[str, Callable[[Table], Iterator[Row]]]:
    """Name on the command line -> rows as they come."""
    spikes = {"nats": 1.0, "after_steps": 5}
    return {
        "kill": lambda table: random_kills(table, kills),
        "term": trials("SIGTERM to the launcher", times, asked_to_stop(signal.SIGTERM, None)),
        "int": trials("SIGINT (Ctrl-C) to the launcher", times, asked_to_stop(signal.SIGINT, None, 130)),
        "usr1": trials("SIGUSR1 to one rank", times, asked_to_stop(signal.SIGUSR1, 1)),
        "orphans": trials("SIGKILL of the launcher", times, launcher_killed),
        "stop": trials("SIGSTOP of one rank: named, then restarted", times, frozen),
        "hang": trials("one rank hangs in Python: named, then restarted", times, injected("hang", "rank {rank} (pid")),
        "raise": trials("one rank fails with an error", times, injected("raise", "a fault was injected")),
        "nan": trials("NaN in one rank's gradient, on_nonfinite=stop", times, injected("gradient", "gradient norm is nan")),
        "skip": trials("NaN in one rank's gradient, on_nonfinite=skip", times,
                       injected("gradient", "skipped, the gradient norm is nan", on_nonfinite="skip")),
        "spike": trials("a spike on one rank: rolled back", times,
                        injected("spike", "are left out (roll-back 1)", spike_rollback=spikes)),
        "disk": trials("a disk that fills (small tmpfs)", times, filled_disk),
        **{f"checkpoint-{n}": trials(fault.name, times, struck(fault)) for n, fault in enumerate(FAULTS, 1)},
    }  # fmt: skip


def add_to(path: Path, row: Row, seed: int) -> None:
    """Add what was tried to what the file holds of the same faults, so that a long table can be made in pieces."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"environment": environment(), "faults": []}
    by_name = {row["fault"]: row for row in held["faults"]}
    sums = by_name.setdefault(row.fault, {**vars(Row(row.fault)), "seeds": []})
    for name in ("tried", "survived", "lost", "problems"):
        sums[name] += getattr(row, name)
    sums["seeds"].append(seed)
    held["faults"] = list(by_name.values())
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


def show(path: Path) -> None:
    """Print the rows of the file as a table in Markdown."""
    print("| fault | tried | survived | steps lost: mean | most |\n|---|---|---|---|---|")
    for row in json.loads(path.read_text(encoding="utf-8"))["faults"]:
        mean, most = (f"{statistics.mean(row['lost']):.1f}", max(row["lost"])) if row["lost"] else ("", "")
        print(f"| {row['fault']} | {row['tried']} | {row['survived']} | {mean} | {most} |")


def main() -> None:
    """Run the faults that were asked for, printing each row as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="SIGKILLs of ranks at random moments")
    parser.add_argument("--times", type=int, default=5, help="trials of every other fault")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="distributed.timeout_seconds of the runs")
    parser.add_argument("--only", nargs="*", help="names of faults: " + " ".join(faults(1, 1)))
    parser.add_argument("--json", type=Path, help="add the rows to those of this file, after each fault")
    parser.add_argument("--show", action="store_true", help="run nothing, print the rows of the file")
    asked = parser.parse_args()
    if asked.show:
        show(asked.json)
        return
    wanted = {name: run for name, run in faults(asked.kills, asked.times).items() if not asked.only or name in asked.only}
    with tempfile.TemporaryDirectory(prefix="mm-faults-") as base:
        table = Table(Path(base), asked.ranks, asked.seed, asked.timeout)
        print(f"{'fault':<58} {'tried':>5} {'survived':>8} {'lost, mean':>10} {'most':>5}")
        for run in wanted.values():
            for row in run(table):
                print("\r" + row.line(), end="", flush=True)
            print()
            for problem in row.problems:
                print(f"    {problem}")
            if asked.json:
                add_to(asked.json, row, asked.seed)


if __name__ == "__main__":
    main()

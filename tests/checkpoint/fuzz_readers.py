"""Spoil checkpoint and tokenizer files in every way, and read them.

    python -m tests.checkpoint.fuzz_readers --count 100000 --seed 1 [--json FILE] [--only NAME] [--case N]

Every reader must either find a whole valid model (tokenizer, header) or raise one of mmcore.errors' classes with one
printable sentence. Defects are: any other exception; a crash; more than --seconds for one case; memory beyond
--megabytes; a file opened outside the case's folder, or opened to write; a program started; a connection; code run.

Cases follow from the seed and their number alone, so that --case N runs one of them again. They run in children that
this process forks, so that a crash costs one case.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from mmcore.checkpoint import disk
from mmcore.errors import MMError
from tests.checkpoint.fuzz_seeds import Target, build

BATCH = 5000
"""Cases that one child runs."""
PIECE = 250
"""Cases that it reports at once: those behind the last report are run again where it crashes."""
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind", "pickle.find_class",
              "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.rmtree")
_LARGEST_SENTENCE = 20_000


class Hang(BaseException):
    """Raised by the alarm; no reader catches it."""


class Watch:
    """What Python reports of files and programs while a case runs."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.faults: list[str] = []
        self.allowed = tuple(os.path.realpath(path) for path in {sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), "/proc", "/sys"})
        self.code = os.path.realpath(Path(__file__).parents[2])
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in _FORBIDDEN:
            self.faults.append(f"{event} {arguments[:2]!r}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            self._opened(os.fsdecode(arguments[0]), arguments[2] or 0)

    def _opened(self, name: str, flags: int) -> None:
        path = os.path.realpath(name)
        inside = (path + os.sep).startswith(self.folder + os.sep)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            self.faults.append(f"opened to write: {path}")
        elif not inside and not path.startswith(self.allowed) and not (path.startswith(self.code) and path.endswith((".py", ".pyc"))):
            self.faults.append(f"opened outside: {path}")


def run_case(targets: list[Target], seed: int, number: int, seconds: float, watch: Watch) -> tuple[str, str, str | None]:
    """(target, outcome, defect or None) of one case; outcomes are whole, refused, unchanged."""
    draw = random.Random(f"{seed}/{number}")
    target = draw.choices(targets, [target.share for target in targets])[0]
    path = target.folder / target.file
    original = path.read_bytes()
    spoiled = target.mutate(draw, original)
    if spoiled == original:
        return target.name, "unchanged", None
    vouched = (target.folder / "manifest.json").read_bytes() if target.vouched else b""
    path.write_bytes(spoiled)
    if target.vouched:
        _vouch(target, vouched)
    try:
        return target.name, *_read(target, seconds, watch)
    finally:
        path.write_bytes(original)
        if target.vouched:
            (target.folder / "manifest.json").write_bytes(vouched)


def _vouch(target: Target, manifest: bytes) -> None:
    values = json.loads(manifest)
    record = disk.hash_file(target.folder / target.file)
    values["files"][target.file] = {"bytes": record.bytes, "sha256": record.sha256}
    (target.folder / "manifest.json").write_text(json.dumps(values))


def _read(target: Target, seconds: float, watch: Watch) -> tuple[str, str | None]:
    watch.faults.clear()
    watch.folder = os.path.realpath(target.folder)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        target.read(target.folder)
        outcome, defect = "whole", None
    except MMError as error:
        outcome, defect = "refused", _ill_said(str(error))
    except Hang:
        outcome, defect = "refused", f"took longer than {seconds} s"
    except BaseException as error:  # noqa: BLE001 (panics of Rust libraries are no Exceptions)
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        outcome, defect = "refused", f"{type(error).__name__}: {str(error)[:300]} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.folder = None
    return outcome, defect or (watch.faults[0] if watch.faults else None)


def _ill_said(sentence: str) -> str | None:
    """Why a message is none for a terminal, or None."""
    if not sentence.isprintable():
        return f"its message is not one printable line: {sentence[:200]!r}"
    return f"its message has {len(sentence)} characters" if len(sentence) > _LARGEST_SENTENCE else None


def _child(targets: list[Target], options: argparse.Namespace, numbers: list[int], out: int, current: mmap.mmap) -> None:
    """Run cases and report them in pieces; `current` always names the one at work. Never returns."""
    status = 1
    try:
        faulthandler.enable()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + (options.megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, _alarm)
        watch = Watch()
        with os.fdopen(out, "w") as pipe:
            for start in range(0, len(numbers), PIECE):
                # for a hang in C, which no alarm ends
                faulthandler.dump_traceback_later(PIECE * options.seconds + 60, exit=True)
                piece = []
                for number in numbers[start : start + PIECE]:
                    current[:8] = number.to_bytes(8, "little")
                    piece.append([number, *run_case(targets, options.seed, number, options.seconds, watch)])
                faulthandler.cancel_dump_traceback_later()
                pipe.write(json.dumps(piece) + "\n")
                pipe.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _alarm(*_: object) -> None:
    raise Hang


def fuzz(options: argparse.Namespace) -> dict:
    """Run the cases; returns counts by target and outcome, and the defects."""
    torch.set_num_threads(1)
    begun = time.monotonic()
    outcomes: dict[str, Counter] = {}
    defects = []
    # In memory: tens of thousands of small files are written.
    root = Path(tempfile.mkdtemp(prefix="mm-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        targets = [target for target in build(root) if options.only in (None, target.name)]
        for target in targets:
            target.read(target.folder)  # the unspoiled files are whole, and what Python loads lazily is loaded
        numbers = [options.case] if options.case is not None else list(range(options.count))
        for start in range(0, len(numbers), BATCH):
            _batch(targets, options, numbers[start : start + BATCH], outcomes, defects)
            found = _summary(options, outcomes, defects, begun)
            if options.json:  # after every batch: a long run that is stopped has still said something
                options.json.write_text(json.dumps(found, indent=1) + "\n")
            if options.verbose:
                print(f"{found['cases']:,} cases, {len(defects)} defects, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return found


def _summary(options: argparse.Namespace, outcomes: dict[str, Counter], defects: list[dict], begun: float) -> dict:
    counts = {name: dict(sorted(counter.items())) for name, counter in sorted(outcomes.items())}
    total = sum((Counter(counter) for counter in counts.values()), Counter())
    return {"seed": options.seed, "cases": sum(total.values()), "outcomes": dict(total), "targets": counts, "defects": defects,
            "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip


def _batch(targets: list[Target], options: argparse.Namespace, numbers: list[int], outcomes: dict, defects: list) -> None:
    """Run the cases in children, a new one behind each case that kills its child."""
    pristine = {target.folder / target.file: (target.folder / target.file).read_bytes() for target in targets}
    pristine |= {path: path.read_bytes() for target in targets if (path := target.folder / "manifest.json").is_file()}
    current = mmap.mmap(-1, 8)
    while numbers:
        inward, outward = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(inward)
            _child(targets, options, numbers, outward, current)
        os.close(outward)
        done = set()
        with os.fdopen(inward) as pipe:
            for line in pipe:
                for number, name, outcome, defect in json.loads(line):
                    done.add(number)
                    outcomes.setdefault(name, Counter())[outcome] += 1
                    if defect:
                        defects.append({"case": number, "target": name, "defect": defect})
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            for path, content in pristine.items():
                path.write_bytes(content)
            killer = int.from_bytes(current[:8], "little")
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            defects.append({"case": killer, "target": "?", "defect": f"the reader crashed or hung ({how})"})
            done.add(killer)
        numbers = [number for number in numbers if number not in done]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="limit of one case")
    parser.add_argument("--megabytes", type=int, default=512, help="memory that a case may take beyond what is in use")
    parser.add_argument("--only", help="one target, by name")
    parser.add_argument("--case", type=int, help="only this case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and defects there")
    parser.add_argument("--verbose", action="store_true", help="tell of each batch")
    options = parser.parse_args()
    found = fuzz(options)
    print(json.dumps(found, indent=1))
    return 1 if found["defects"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

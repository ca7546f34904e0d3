"""How many processors this process may use: those it is bound to, and the time that a container grants it (cgroups).

PyTorch looks at the first alone. In a container of two processors' time on a machine of 64 it starts 64 threads, which
wait for each other while the system holds them back. Only the standard library, since it must run before torch is imported.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path

_VARIABLE = "OMP_NUM_THREADS"  # read by OpenMP, MKL and torch when they are loaded
_chosen: str | None = None


def bound() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowed(root: Path = Path("/")) -> int:
    """Processors that this process may use, at least 1, in whole ones as threads are: a quota is rounded to the nearest.

    Training steps on 2 processors with 1 and 2 threads, tokens/s: quota 1.0 6,804 and 5,200, 1.5 7,158 and 8,702.
    """
    quota = granted(root)
    return bound() if quota is None else max(1, min(bound(), int(quota + 0.5)))


def granted(root: Path = Path("/")) -> float | None:
    """The time that cgroups (version 2 or 1) grant, in processors; None where there is no limit or nothing says so."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found = []
    for line in groups:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers == "":
            found += _up(root / "sys/fs/cgroup", path, _unified)
        elif "cpu" in controllers.split(","):
            for name in dict.fromkeys(("cpu", controllers)):
                found += _up(root / "sys/fs/cgroup" / name, path, _first_version)
    return min(found, default=None)


def _up(top: Path, path: str, read: Callable[[Path], tuple[float, float]]) -> list[float]:
    """The limits of a group and of all above it. A container may be told the host's path: what is not there says nothing."""
    place, found = top / path.strip("/"), []
    while True:
        with contextlib.suppress(OSError, ValueError):
            limit, period = read(place)
            if 0 < limit < math.inf and period > 0:
                found.append(limit / period)
        if place == top:
            return found
        place = place.parent


def _unified(place: Path) -> tuple[float, float]:
    limit, period = (place / "cpu.max").read_text().split()
    return float(limit), float(period)  # "max" is no number, and no limit


def _first_version(place: Path) -> tuple[float, float]:
    return float((place / "cpu.cfs_quota_us").read_text()), float((place / "cpu.cfs_period_us").read_text())


def keep_to_quota() -> None:
    """Let torch, which must not be imported yet, start no more threads than this process is granted processors; where the
    user has set OMP_NUM_THREADS that holds. For the commands, whose process is their own."""
    global _chosen
    if _VARIABLE not in os.environ and (count := allowed()) < bound():
        os.environ[_VARIABLE] = _chosen = str(count)


def share(environment: dict[str, str], processes: int) -> None:
    """Give each of `processes` its part of the allowed processors in `environment`, where its user has not."""
    if _VARIABLE not in environment or environment[_VARIABLE] == _chosen:
        environment[_VARIABLE] = str(max(1, allowed() // processes))

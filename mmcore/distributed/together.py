"""Work that only some ranks do while the others wait, and errors that all ranks raise together.

Reading, tokenizing and saving may take hours on one rank. The others do not wait in a collective, whose time is
bounded, but at the store, for as long as the working rank's heart beats. What is passed on is JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mmcore import errors
from mmcore.distributed.mesh import World
from mmcore.distributed.reduce import agreed

T = TypeVar("T")

_BEAT_SECONDS = 5.0
_POLL_SECONDS = 0.5
_calls = itertools.count()
"""Numbers the calls of this module, which every rank makes in the same order, so that their keys differ."""


def on_first(world: World, work: Callable[[], Any]) -> Any:
    """Run `work` on rank 0 alone; its value, which JSON must be able to hold, comes back on every rank.

    What it raises is raised on every rank. Raises HardwareError where rank 0 falls silent.
    """
    if world.size == 1:
        return work()
    key = f"first/{next(_calls)}"
    return _working(world, key, work, lambda value: value) if world.is_first else _await(world, key, 0)


def in_turn(world: World, work: Callable[[], T]) -> T:
    """Run `work` on every rank: on rank 0 first, then on one rank of every other node, then on the rest.

    For work that leaves its result on the disk, where the ranks that follow find it: a disk may be shared by all nodes
    or belong to each. What a rank raises is raised by all that wait for it.
    """
    if world.size == 1:
        return work()
    key = f"turn/{next(_calls)}"
    leader = world.rank - world.local_rank
    if world.rank != 0:
        _await(world, f"{key}/0", 0)
    if world.local_rank != 0 and leader != 0:
        _await(world, f"{key}/{leader}", leader)
    return _working(world, f"{key}/{world.rank}", work, lambda _: None) if world.local_rank == 0 else work()


@contextlib.contextmanager
def all_or_none(world: World) -> Iterator[None]:
    """Where the block raises on one rank, every rank raises: itself where it failed, else what the lowest of them said.

    The block must not talk to other ranks: one that failed would not answer.
    """
    if world.size == 1:
        yield
        return
    key, failure = f"all/{next(_calls)}", None
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it is, the others must hear of it)
        failure = error
        world.store.set(f"{key}/{world.rank}", json.dumps(_described(error)))
    if not agreed(failure is not None, world):
        return
    if failure is not None:
        raise failure
    # Every failing rank has set its key before it agreed
    first = next(rank for rank in range(world.size) if world.store.check([f"{key}/{rank}"]))
    _raise(json.loads(world.store.get(f"{key}/{first}")), first)


def _working(world: World, key: str, work: Callable[[], T], told: Callable[[T], Any]) -> T:
    """Run `work` with a beating heart and publish how it ended."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(min(_BEAT_SECONDS, world.timeout_seconds / 4)):
            world.store.add(f"{key}/beat", 1)

    heart = threading.Thread(target=beat, name="heartbeat", daemon=True)
    heart.start()
    try:
        value = work()
    except Exception as error:
        world.store.set(key, json.dumps(_described(error)))
        raise
    finally:
        done.set()
        heart.join()
    world.store.set(key, json.dumps({"value": told(value)}))
    return value


def _await(world: World, key: str, rank: int) -> Any:
    """What `rank` publishes under `key`. Raises what it raised, or HardwareError once its heart has stopped."""
    beats, heard, pause = 0, time.monotonic(), 0.01
    while not world.store.check([key]):  # the store's own wait prints a warning whenever its time is over
        time.sleep(pause)
        pause = min(1.5 * pause, _POLL_SECONDS)
        now = world.store.add(f"{key}/beat", 0)
        if now != beats:
            beats, heard = now, time.monotonic()
        elif time.monotonic() - heard > world.timeout_seconds:
            raise errors.HardwareError(
                f"rank {rank} has been silent for {world.timeout_seconds:g} s: look at its log, and go on with --resume"
            )
    outcome = json.loads(world.store.get(key))
    if "value" not in outcome:
        _raise(outcome, rank)
    return outcome["value"]


def _described(error: Exception) -> dict[str, str]:
    return {"error": type(error).__name__, "sentence": str(error)}


def _raise(outcome: dict[str, str], rank: int) -> None:
    """The error of another rank: of the same kind where it is meant for the user."""
    kind = getattr(errors, outcome["error"], None)
    if isinstance(kind, type) and issubclass(kind, errors.MMError):
        raise kind(outcome["sentence"])
    raise RuntimeError(f"rank {rank} failed with {outcome['error']}: {outcome['sentence']}")

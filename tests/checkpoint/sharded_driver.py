"""Run as a program: checkpoints of 1 to 4 gloo ranks, saved, read back on other numbers of ranks, and made to fail.

    python -m tests.checkpoint.sharded_driver FOLDER

Leaves FOLDER/<name>/checkpoints for every name of LAYOUTS, and results.json: check -> "ok" or what was wrong. Torch is
loaded once; every group of ranks is forked from this process.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmcore.checkpoint import disk, integrity
from mmcore.checkpoint.resolve import iterate_whole
from mmcore.checkpoint.store import load_state, whole_checkpoints
from mmcore.checkpoint.tensorfile import Stored
from mmcore.distributed.mesh import World
from mmcore.distributed.messages import Messages
from mmcore.errors import CheckpointError
from tests.checkpoint.sharded_model import Toy, writer
from tests.distributed.checkpoint_faults import small_disk
from tests.helpers.forked_ranks import run_ranks

LAYOUTS = {1: {"one": False}, 2: {"two": False}, 3: {"three": False}, 4: {"four": False, "hybrid": True}}
"""Ranks -> names, and whether two groups of the ranks hold the same rows."""
GOES_ON = {1: ("two", "three", "hybrid"), 2: ("one", "two", "three"), 3: ("two", "four"), 4: ("two", "three", "hybrid")}
"""Ranks -> the layouts that are resumed on them."""


def unbroken() -> list[str]:
    """Digests of weights and moments of one process after 0 to 4 steps."""
    toy = Toy(World())
    digests = [""]
    for _ in range(4):
        toy.train(1)
        digests.append(toy.digest())
    return digests


# -- saving ----------------------------------------------------------------------------------------------------


def save_all(world: World, folder: str) -> list[Any]:
    return [save_two_steps(world, f"{folder}/{name}", hybrid) for name, hybrid in LAYOUTS[world.size].items()]


def save_two_steps(world: World, run: str, hybrid: bool) -> dict[str, Any]:
    """Save step 1, step 2 in the background, and train on at once. What each poll gave is told by name."""
    toy = Toy(world, hybrid=hybrid)
    saver = writer(Path(run), world, asynchronous=True)
    toy.train(1)
    toy.save(saver, wait=True)
    assert saver.poll().name == "step-000001" and saver.poll() is None and not saver.busy
    toy.train(1)
    toy.save(saver)
    digest = toy.digest()
    with torch.no_grad():
        for parameter in toy.model.parameters():
            parameter.detach().fill_(77.0)
        for state in toy.optimizer.state.values():
            state["exp_avg"].fill_(88.0)
    polls = []
    while saver.busy:
        polls.append(str(saver.poll()))
        time.sleep(0.01 * (world.rank + 1))
    assert saver.timing.step == 2 and saver.timing.background_seconds > 0
    names = sorted(os.listdir(Path(run) / "checkpoints"))
    return {"digest": digest, "polls": polls, "names": names}


def check_saving(folder: Path, digests: list[str], size: int) -> None:
    for name, *answers in zip(LAYOUTS[size], *run_ranks(size, save_all, str(folder)), strict=True):
        check_saved(folder / name, digests, size, answers)


def check_saved(run: Path, digests: list[str], size: int, answers: list[dict[str, Any]]) -> None:
    """The same on all ranks, and read by one process the very weights, whatever happened to them since."""
    assert all(answer == answers[0] for answer in answers), answers
    assert answers[0]["digest"] == digests[2], "the ranks do not train as one process does"
    assert answers[0]["names"] == ["step-000001", "step-000002"]
    assert answers[0]["polls"][-1] == str(run / "checkpoints" / "step-000002")
    assert set(answers[0]["polls"][:-1]) <= {"None"}
    for step, path in zip((2, 1), whole_checkpoints(run), strict=True):
        saved, toy = load_state(path, verify=True), Toy(World())
        toy.restore(path)
        assert (saved.step, toy.digest()) == (step, digests[step])
    files = sorted(path.name for path in path.glob("*.safetensors"))
    expected = [f"{part}-rank{rank:05d}-of-{size:05d}.safetensors" for part in ("model", "optimizer")
                for rank in range(1, size + 1)]  # fmt: skip
    assert files == (["model.safetensors", "optimizer.safetensors"] if size == 1 else expected)


def go_on_from_all(world: World, folder: str) -> list[Any]:
    return [go_on(world, f"{folder}/{name}") for name in GOES_ON[world.size]]


def go_on(world: World, run: str) -> dict[str, Any]:
    """Resume the newest checkpoint, counting what is hashed and read, and make a step."""
    hashed, read = [], []
    hash_file, take = disk.hash_file, Stored._take
    disk.hash_file = lambda path: hashed.append(path.name) or hash_file(path)

    def counted(self, path, shape, read_it, rows=None):
        tensor = take(self, path, shape, read_it, rows)
        read.append(tensor.numel())
        return tensor

    Stored._take = counted
    try:
        path = next(iterate_whole(run, messages=Messages(world)))
        toy = Toy(world)
        toy.train(1)  # other weights than those to come
        toy.restore(path)
    finally:
        disk.hash_file, Stored._take = hash_file, take
    named, moments = toy.tensors()
    own = sum((t.to_local() if world.size > 1 else t).numel() for t in (named | moments).values())
    digest = toy.digest()
    toy.train(1)
    return {"path": str(path), "digests": [digest, toy.digest()], "hashed": hashed, "read": sum(read), "own": own}


def check_resuming(folder: Path, digests: list[str], size: int) -> None:
    """On any number of ranks, from any; each rank reads its own rows, and hashes its part of the files."""
    for name, *answers in zip(GOES_ON[size], *run_ranks(size, go_on_from_all, str(folder)), strict=True):
        path = Path(answers[0]["path"])
        assert path.name == "step-000002" and all(answer["path"] == str(path) for answer in answers)
        assert all(answer["digests"] == digests[2:4] for answer in answers), f"{name} on {size} ranks"
        hashed = [file for answer in answers for file in answer["hashed"]]
        assert sorted(hashed) == sorted({entry.name for entry in path.iterdir()} - {"manifest.json"})
        for answer in answers:
            assert answer["read"] == answer["own"], "a rank reads its rows and no others"
            assert abs(len(answer["hashed"]) - len(hashed) / size) < 1


# -- failing ---------------------------------------------------------------------------------------------------


def refuse(number: int, code: int = errno.ENOSPC, name: str = "write") -> Callable[[], None]:
    """Let the number-th call of os.<name> fail; returns what undoes it."""
    real, left = getattr(os, name), iter(range(number - 1, -1, -1))

    def failing(*arguments, **options):
        if next(left, -1) == 0:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    setattr(os, name, failing)
    return lambda: setattr(os, name, real)


def poison(toy: Toy) -> Callable[[], None]:
    """One value of this rank's rows is not a number, after training went wrong unseen."""
    local = dict(toy.model.named_parameters())["lm_head.weight"].detach().to_local()
    value = local.view(-1)[0].item()
    local.view(-1)[0] = math.nan
    return lambda: local.view(-1)[0].fill_(value)


FAILURES: dict[str, tuple[int, Callable[[Toy], Callable[[], None]], str]] = {
    "a full disk under rank 1": (1, lambda toy: refuse(2), "rank 1: cannot write .*the disk is full"),
    "a full disk under rank 0": (0, lambda toy: refuse(9), "rank 0: cannot write .*the disk is full"),
    "a full disk under the index of the shards": (0, lambda toy: refuse_file("shards.json"),
                                                  "rank 0: cannot write .*the disk is full"),
    "a full disk under the manifest": (0, lambda toy: refuse_file("manifest.json"), "rank 0: cannot write .*full"),
    "no folder can be made": (0, lambda toy: refuse(1, errno.EACCES, "mkdir"), "rank 0: .*no permission to write there"),
    "the name cannot be given": (0, lambda toy: refuse(1, errno.EIO, "rename"), "rank 0: cannot write .*put/output error"),
    "a sync that fails under rank 1": (1, lambda toy: refuse(1, errno.EIO, "fsync"), "rank 1: .*nput/output error"),
    "a weight of rank 1 that is no number": (1, poison, "rank 1: tensor lm_head.weight holds NaN or infinity"),
}  # fmt: skip
"""Name -> the rank at fault, what causes it there and returns the cure, and what all ranks must say."""


def refuse_file(name: str) -> Callable[[], None]:
    """Let every write to the file `name` fail for want of room."""
    real_open, real_write, descriptors = os.open, os.write, set()

    def opening(path, *arguments, **options):
        descriptor = real_open(path, *arguments, **options)
        (descriptors.add if Path(path).name == name else descriptors.discard)(descriptor)
        return descriptor

    def writing(descriptor, data):
        if descriptor in descriptors:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(descriptor, data)

    os.open, os.write = opening, writing

    def undo() -> None:
        os.open, os.write = real_open, real_write

    return undo


def fail_and_go_on(world: World, run: str) -> dict[str, Any]:
    """Cause each failure on its rank; all ranks must say the same in the same call, and save again afterwards."""
    toy, told = Toy(world), {}
    saver = writer(Path(run), world, asynchronous=True, keep_last=1)
    toy.train(1)
    toy.save(saver, wait=True)
    saver.wait()
    for name, (rank, cause, _) in FAILURES.items():
        toy.step += 1
        undo = cause(toy) if world.rank == rank else (lambda: None)
        calls = 0
        try:
            toy.save(saver)
            while saver.busy:
                calls += 1
                saver.poll()
                time.sleep(0.01)
            told[name] = "no error"
        except CheckpointError as error:
            told[name] = f"{calls} {error}"
        undo()
        names = sorted(os.listdir(Path(run) / "checkpoints"))
        assert Messages(world).all(names == ["step-000001"]), f"after {name}: {names}"
    state = {"loss": math.nan} if world.rank == 0 else {}
    try:
        model, moments = toy.tensors()
        saver.save(99, model=model, optimizer=moments, state=state, config={}, wait=True)
        told["a state that JSON cannot hold"] = "no error"
    except CheckpointError as error:
        told["a state that JSON cannot hold"] = f"0 {error}"
    toy.step += 1
    toy.save(saver, wait=True)
    assert saver.wait().name == f"step-{toy.step:06d}"
    told["names"] = sorted(os.listdir(Path(run) / "checkpoints"))
    return told


def check_failures(folder: Path, digests: list[str]) -> None:
    import re

    answers = run_ranks(2, fail_and_go_on, str(folder / "failures"))
    assert answers[0] == answers[1], answers
    for name, (_, _, words) in FAILURES.items():
        told = answers[0][name]
        assert re.search(words, told) and "\n" not in told, f"{name}: {told}"
    assert answers[0]["names"] == [f"step-{len(FAILURES) + 2:06d}"]
    (path,) = whole_checkpoints(folder / "failures")
    toy = Toy(World())
    toy.restore(path)
    assert toy.digest() == digests[1], "the failures changed the weights"


def fill_the_disk(world: World, run: str) -> list[Any]:
    """Save step after step until there is no room, then make room and save again."""
    toy, saved = Toy(world), []
    saver = writer(Path(run), world, asynchronous=True)
    try:
        for _ in range(9):
            toy.train(1)
            toy.save(saver)
            saved.append(saver.wait().name)
        told = "no error"
    except CheckpointError as error:
        told = str(error)
    names = sorted(os.listdir(Path(run) / "checkpoints"))
    Messages(world).all(True)
    if world.rank == 0:
        disk.remove_folder(Path(run) / "checkpoints" / saved[0])
    Messages(world).all(True)
    toy.save(saver, wait=True)
    return [told, saved, names, saver.wait().name]


def check_a_full_disk(folder: Path, digests: list[str]) -> None:
    """A real one: a small file system, on which two checkpoints fit and a third does not."""
    with small_disk(folder / "small", "500k") as run:
        answers = run_ranks(2, fill_the_disk, str(run))
        assert answers[0] == answers[1], answers
        told, saved, names, last = answers[0]
        assert "the disk is full: free some space" in told and "earlier checkpoints are untouched" in told
        assert saved and names == saved, "nothing half-written is left"
        assert [path.name for path in whole_checkpoints(run)] == [last, *saved[:0:-1]]
        toy = Toy(World())
        toy.restore(run / "checkpoints" / saved[-1])
        assert len(saved) > 4 or toy.digest() == digests[len(saved)]


def say_what_is_skipped(world: World, run: str) -> list[Any]:
    """Damage seen by one rank only is heard by all."""
    heard: list[str] = []
    found = next(iterate_whole(run, heard.append, messages=Messages(world)), None)
    try:
        integrity.check(Path(run) / "checkpoints" / "step-000002", messages=Messages(world))
        raised = ""
    except CheckpointError as error:
        raised = str(error)
    return [str(found), heard, raised]


def check_agreement_about_damage(folder: Path, digests: list[str]) -> None:
    import shutil

    run = folder / "damaged"
    shutil.copytree(folder / "two", run)
    shard = run / "checkpoints" / "step-000002" / "model-rank00002-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)
    answers = run_ranks(3, say_what_is_skipped, str(run))
    assert answers[0] == answers[1] == answers[2]
    found, heard, raised = answers[0]
    assert found.endswith("step-000001") and heard == [f"passed over a checkpoint: {raised}"]
    assert raised.endswith("step-000002 is not whole: model-rank00002-of-00002.safetensors was altered")


def checks() -> dict[str, Callable[[Path, list[str]], None]]:
    def bind(check: Callable[..., None], argument: Any) -> Callable[[Path, list[str]], None]:
        return lambda folder, digests: check(folder, digests, argument)

    table = {f"saved on {size}": bind(check_saving, size) for size in LAYOUTS}
    table |= {f"resumed on {size}": bind(check_resuming, size) for size in GOES_ON}
    return table | {"failures are shared": check_failures, "a full disk is shared": check_a_full_disk,
                    "damage is agreed on": check_agreement_about_damage}  # fmt: skip


def main(folder: Path) -> None:
    digests, results = unbroken(), {}
    for name, check in checks().items():
        try:
            check(folder, digests)
            results[name] = "ok"
        except OSError as error:
            results[name] = f"skipped: {error}"
        except (AssertionError, SystemExit) as error:
            results[name] = "".join(traceback.format_exception(error))
    (folder / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

"""Saving training checkpoints: by one rank or many, while training goes on, whole or absent.

A save has three parts. `save` checks, copies this rank's rows to host memory, and has rank 0 make the temporary
folder: that is the stall. A thread of each rank then writes the rank's files, hashed on the way and synced. Once all
ranks are done (`poll` asks at every step) rank 0's thread writes shards.json and manifest.json, renames the folder,
and removes what is no longer kept. Ranks speak to one another only from their main threads, in `save` and `poll`,
which every rank calls in the same step: nothing in the background can wait for another rank, so no rank can hang
there, and what failed on one is raised by all in the same step.

Why not torch.distributed.checkpoint: its async_save speaks from a thread over a process group, and a rank that fails
there leaves the others at a barrier; it exchanges plans and stores metadata by pickle; it knows no hashes, so a
flipped bit loads silently. Its planners would remain, which find where any layout meets any other. Here every layout
is whole rows, where that is one comparison (rows.py).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mmcore.checkpoint import disk, manifest, sharded, tensorfile
from mmcore.checkpoint.contents import check_optimizer, own_texts
from mmcore.checkpoint.disk import FileRecord
from mmcore.checkpoint.formats.folder import copied
from mmcore.checkpoint.formats.modelconfig import config_from
from mmcore.checkpoint.host_copy import HostCopy
from mmcore.checkpoint.names import check_tensors, expected_tensors
from mmcore.checkpoint.retention import purge
from mmcore.checkpoint.rows import written
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.distributed.mesh import World
from mmcore.distributed.messages import GLANCE, Messages
from mmcore.errors import CheckpointError

_KEPT = "earlier checkpoints are untouched"


@dataclass
class _Save:
    """One save in flight, as one rank sees it."""

    step: int
    target: Path
    specs: dict[str, dict[str, TensorSpec]]
    """Section -> name -> the whole tensor."""
    tensors: dict[str, dict[str, Tensor]]
    """Section -> name -> the rows that this rank writes."""
    rows: dict[str, dict[str, tuple[int, int]]]
    """Section -> name -> which rows those are."""
    texts: dict[str, bytes | Path]
    protected: frozenset[str]
    folder: Path
    """The temporary one."""
    opened: ExitStack = field(default_factory=ExitStack)
    """Rank 0's hold on the temporary folder; closing it publishes."""
    records: dict[str, FileRecord] = field(default_factory=dict)
    """This rank's files, in the end those of all."""
    error: BaseException | None = None
    collected: bool = False
    """Whether the ranks have told one another what they wrote."""
    thread: threading.Thread | None = None
    began: float = 0.0
    stalled: float = 0.0
    ended: float = 0.0

    @property
    def idle(self) -> bool:
        return self.thread is None or not self.thread.is_alive()


@dataclass(frozen=True)
class Timing:
    """What the last published save cost."""

    step: int
    stalled_seconds: float
    """Training stood still."""
    background_seconds: float
    """From there until the checkpoint had its name."""


class CheckpointWriter:
    """Saves the steps of a run below `run_folder`/checkpoints.

    world: all ranks make the same calls with the same steps; one process is a world of one. keep_last, keep_every:
    see retention.purge. asynchronous=False writes before `save` returns, without a copy in memory. patience: seconds
    that `wait` gives the ranks' disks. The folder must lie on a file system that all ranks share.
    """

    def __init__(self, run_folder: str | Path, world: World, *, keep_last: int = 2, keep_every: int = 0,
                 asynchronous: bool = True, patience: float = 3600.0,
                 shard_bytes: int = tensorfile.SHARD_BYTES):  # fmt: skip
        self.timing: Timing | None = None
        """Of the checkpoint that poll or wait returned last."""
        self._checkpoints = Path(run_folder).absolute() / "checkpoints"
        self._messages = Messages(world)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._asynchronous, self._patience, self._shard_bytes = asynchronous, patience, shard_bytes
        self._host_copy = HostCopy()
        self._save: _Save | None = None
        self._published: Path | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._save is not None

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        config: Mapping[str, Any],
        files: Mapping[str, bytes | Path] | None = None,
        protect: Iterable[str | Path] = (),
        wait: bool = False,
    ) -> None:
        """Begin to save step `step`; a save in flight is waited for first. `poll` or `wait` hand out the result.

        model: contract names -> weights, plain or sharded by rows, all that `config` (config.json's values; dtype is
        set here) implies. optimizer: `exp_avg.<name>` and `exp_avg_sq.<name>` -> tensors of the weight's shape and
        layout; none at all for a checkpoint of the model alone. state: plain values for trainer.json. files: further
        files by name (recipe.yaml, tokenizer.model ...), as bytes or paths to copy. `protect` (the checkpoint resumed
        from) is never removed. wait=True returns once the checkpoint is there.

        On return the tensors may change. Raises CheckpointError, on all ranks alike, for tensors that do not fit the
        configuration or, where it waits, whatever `poll` raises; then nothing has changed on the disk.
        """
        if self._save is not None:
            self._published = self.wait()
        began = time.perf_counter()
        aside = self._asynchronous and not wait
        save, error = None, None
        try:
            save = self._prepare(step, model, optimizer, state, config, files or {}, protect, aside)
        except Exception as caught:
            error = caught
        self._agree_on_folder(step, save, error)
        self._save, save.began = save, began
        self._run(save, lambda: self._first_part(save), here=not aside and self._messages.size == 1)
        save.stalled = time.perf_counter() - began
        if not aside:
            self._published = self.wait()
            self.timing = Timing(step, time.perf_counter() - began, 0.0)

    def poll(self) -> Path | None:
        """The checkpoint that was published since the last call, or None. Never waits for a disk.

        Raises what went wrong in the background, as one CheckpointError on all ranks in the same call.
        """
        if self._published is not None:
            path, self._published = self._published, None
            return path
        save = self._save
        if save is None or not self._advance(save):
            return None
        return self._conclude(save)

    def wait(self) -> Path | None:
        """Wait until no save is in flight; the newest checkpoint published since the last poll, or None.

        Raises as `poll` does, and where a rank's disk takes longer than `patience`.
        """
        path, end = self.poll(), time.monotonic() + self._patience
        while self._save is not None:
            if self._messages.size == 1 and self._save.thread is not None:
                self._save.thread.join(self._patience)
            elif not self._save.idle:
                time.sleep(GLANCE)
            path = self.poll() or path
            self._lose_patience(time.monotonic() > end)
        return path

    def close(self) -> None:
        """Let a save in flight end where that needs nobody else; of several ranks it is given up.

        For a run that ends with an error: what was given up stays as a temporary folder, which the next writer of
        the run removes.
        """
        save, self._save = self._save, None
        if save is not None and self._messages.size == 1 and save.thread is not None:
            save.thread.join()

    # -- before the write: checks, copies, the folder -----------------------------------------------------------

    def _prepare(self, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor],
                 state: Mapping[str, Any], config: Mapping[str, Any], files: Mapping[str, bytes | Path],
                 protect: Iterable[str | Path], aside: bool) -> _Save:  # fmt: skip
        settings = config_from(dict(config), "the configuration to save")
        check_tensors(settings, {name: tuple(tensor.shape) for name, tensor in model.items()}, "the model to save")
        check_optimizer(settings, {name: tuple(tensor.shape) for name, tensor in optimizer.items()}, "the optimizer")
        texts = own_texts(step, state, config, next(iter(model.values())).dtype) | dict(files)
        sections = {"model": {name: model[name] for name in expected_tensors(settings)}, "optimizer": optimizer}
        mine = {section: written(tensors, self._messages.rank, self._messages.size)
                for section, tensors in sections.items()}  # fmt: skip
        if aside:
            tensors = self._host_copy.copy(mine)
        else:
            tensors = {section: {name: rows.local for name, rows in part.items()} for section, part in mine.items()}
        save = _Save(
            step=step,
            target=self._checkpoints / manifest.folder_name(step),
            specs={section: {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in part.items()}
                   for section, part in sections.items()},
            tensors=tensors,
            rows={section: {name: (rows.start, rows.stop) for name, rows in part.items()}
                  for section, part in mine.items()},
            texts=texts,
            protected=frozenset(Path(path).absolute().name for path in protect),
            folder=Path(),
        )  # fmt: skip
        if self._messages.rank == 0:
            with disk.writing(save.target, _KEPT):
                disk.make_folders(self._checkpoints)
                save.folder = save.opened.enter_context(disk.new_folder(save.target))
        return save

    def _agree_on_folder(self, step: int, save: _Save | None, error: Exception | None) -> None:
        """Give every rank the folder that rank 0 made, or raise on all of them."""
        said = {"error": _sentence(error), "folder": save.folder.name if save else ""}
        answers = self._messages.share(said)
        fault = self._fault(step, [answer["error"] for answer in answers], error)
        if fault is not None:
            if save is not None:
                _give_up(save)
            raise fault
        save.folder = self._checkpoints / answers[0]["folder"]

    # -- in the background --------------------------------------------------------------------------------------

    def _run(self, save: _Save, work: Callable[[], None], here: bool = False) -> None:
        """Do `work`, in a thread or here; what it raises is kept in `save.error`.

        Among several ranks always in a thread: whoever is done first must not wait for the others' disks inside a
        collective, whose time is short.
        """

        def guarded() -> None:
            try:
                with disk.writing(save.target, _KEPT):
                    work()
            except BaseException as error:  # noqa: BLE001 - raised by poll, on all ranks
                save.error = error
            save.ended = time.perf_counter()

        if here:
            guarded()
        else:
            save.thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
            save.thread.start()

    def _first_part(self, save: _Save) -> None:
        """Write this rank's files; alone, publish as well."""
        rank, size = self._messages.rank, self._messages.size
        with save.opened if size == 1 else nullcontext():
            if rank == 0:
                disk.recover(self._checkpoints, lambda name: name.startswith("step-"))
                save.records |= copied(save.folder, save.texts)
            elif not save.folder.is_dir():
                raise CheckpointError(
                    f"rank {rank} does not see {save.folder}, which rank 0 has made: let checkpoint.folder lie on a file "
                    f"system that all machines share"
                )
            limit = self._shard_bytes if size == 1 else None
            for section, tensors in save.tensors.items():
                if not tensors:
                    continue  # a checkpoint of the model alone, or fewer rows than ranks
                specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
                stem = sharded.stem(section, rank, size)
                save.records |= tensorfile.write_tensors(save.folder, stem, tensors, specs, limit)
            if size == 1:
                manifest.write_manifest(save.folder, save.step, save.records)
        if size == 1:
            self._purge(save)

    def _second_part(self, save: _Save, pieces: list[sharded.Pieces]) -> None:
        """On rank 0, once all ranks have written: what makes the folder a checkpoint, its name, and the purge."""
        with save.opened:
            for name, record in save.records.items():
                if os.stat(save.folder / name).st_size != record.bytes:
                    raise CheckpointError(
                        f"{name} of step {save.step} is not here as its rank wrote it: let checkpoint.folder lie on a "
                        f"file system that all machines share"
                    )
            data = sharded.index_bytes(save.specs, pieces)
            save.records[sharded.NAME] = disk.write_file(save.folder / sharded.NAME, [data])
            manifest.write_manifest(save.folder, save.step, save.records)
        self._purge(save)

    def _purge(self, save: _Save) -> None:
        purge(save.target, keep_last=self._keep_last, keep_every=self._keep_every, protected=save.protected)

    # -- between the two parts, and after them ------------------------------------------------------------------

    def _advance(self, save: _Save) -> bool:
        """Go on with a save as far as that goes now; whether it has ended. The same answer on all ranks."""
        if not self._messages.all(save.idle):
            return False
        if self._messages.size == 1 or save.collected:
            return True
        save.collected = True
        records = {name: [record.bytes, record.sha256] for name, record in save.records.items()}
        answers = self._messages.share({"error": _sentence(save.error), "records": records})
        pieces = self._messages.gather(save.rows)
        fault = self._fault(save.step, [answer["error"] for answer in answers], save.error)
        if fault is not None:
            save.error = fault
            _give_up(save)
            return True
        if self._messages.rank == 0:
            save.records = {name: FileRecord(*record) for answer in answers for name, record in answer["records"].items()}
            self._run(save, lambda: self._second_part(save, pieces))
        return self._messages.all(save.idle)

    def _conclude(self, save: _Save) -> Path:
        """Forget a save that has ended: its folder, or what went wrong."""
        self._save = None
        answers = self._messages.share({"error": _sentence(save.error)})
        fault = self._fault(save.step, [answer["error"] for answer in answers], save.error)
        if fault is not None:
            raise fault
        self.timing = Timing(save.step, save.stalled, max(0.0, save.ended - save.began - save.stalled))
        return save.target

    def _fault(self, step: int, errors: list[str | None], own: BaseException | None) -> BaseException | None:
        """What this rank raises, given the sentences of all ranks: the same on each, its own error alone in a world
        of one."""
        faults = {rank: error for rank, error in enumerate(errors) if error is not None}
        if not faults or self._messages.size == 1:
            return own
        first = min(faults)
        alike = len(faults) == self._messages.size and len(set(faults.values())) == 1
        fault = CheckpointError(faults[first] if alike else f"rank {first}: {faults[first]}")
        fault.__cause__ = own
        return fault

    def _lose_patience(self, expired: bool) -> None:
        """Raise on all ranks, naming those that still write, once any rank's patience is at its end."""
        if self._save is None or self._messages.all(not expired):
            return
        step, late = self._save.step, [rank for rank, idle in enumerate(self._messages.share(self._save.idle)) if not idle]
        self._save = None
        names = ", ".join(map(str, late)) or "none"
        raise CheckpointError(
            f"step {step} was not written within {self._patience:.0f} seconds (ranks still writing: {names}): look at "
            f"their disks; {_KEPT}"
        )


def _sentence(error: BaseException | None) -> str | None:
    if error is None or isinstance(error, CheckpointError):
        return None if error is None else str(error)
    return f"{type(error).__name__}: {error}"


def _give_up(save: _Save) -> None:
    """Remove the temporary folder, where this rank made it; what the disk refuses is left to the next writer."""
    with suppress(CheckpointError, OSError), save.opened:
        raise CheckpointError("given up")

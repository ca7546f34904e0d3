"""Watching the ranks of a training run; a run of one process is not watched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from mmcore.config import Recipe
from mmcore.distributed.mesh import World
from mmcore.training.run_folder import disk_errors

SAVING = "saving"
"""The stage whose length nobody knows: a slow disk is no hang, as long as all ranks are alive."""


class NotWatching:
    """Stands for a Watch where there is nothing to watch."""

    def beat(self, step: int, stage: str) -> None:
        """Nothing to tell."""


@contextlib.contextmanager
def watch_ranks(
    world: World, recipe: Recipe, on_hang: Callable[[str], None], on_orphan: Callable[[], None]
) -> Iterator[object]:
    """What to tell of the run's stages; a rank that hangs is named within distributed.timeout_seconds."""
    if world.size == 1:
        yield NotWatching()
        return
    from torch.distributed import PrefixStore

    from mmcore.distributed.watch import Watch

    folder = recipe.run_folder / "logs"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stacks = folder / f"rank-{world.rank:05d}.stacks.txt"
    store = PrefixStore("watch", world.store.clone())
    with Watch(
        world, store, recipe.distributed.timeout_seconds, stacks, on_hang, on_orphan, patient=frozenset({SAVING})
    ) as watch:
        yield watch

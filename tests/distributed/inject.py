"""`mm` with a fault: `MM_FAULT=gradient:1:7 torchrun ... -m tests.distributed.inject pretrain RECIPE`.

MM_FAULT is KIND:RANK:STEP; it happens in the first start of the ranks, not after a restart.

gradient   the rank's gradient is NaN       spike   its loss is three times as large
hang       it sleeps in that step           raise   it fails with an error of ours
"""

from __future__ import annotations

import math
import os
import time

from mmcli.app import main


def inject(kind: str, step: int) -> None:
    """Make this process's trainer fail in `step`."""
    from mmcore.training import trainer as module

    plain = module.accumulate

    def accumulate(model, batches, *rest):
        hurt = running[0].step + 1 == step and not running[0].faults.counts.rollbacks
        if hurt and kind == "hang":
            time.sleep(3600)
        if hurt and kind == "raise":
            raise RuntimeError("a fault was injected")
        if not hurt:
            return plain(model, batches, *rest)
        clean = model.loss
        model.loss = lambda *a, **k: _worse(clean(*a, **k), kind)
        try:
            return plain(model, batches, *rest)
        finally:
            model.loss = clean

    running = []
    prepare = module.Trainer.__init__

    def remember(self, *arguments, **settings):
        prepare(self, *arguments, **settings)
        running.append(self)

    module.accumulate, module.Trainer.__init__ = accumulate, remember


def _worse(loss, kind):
    if kind == "spike":
        return loss * 3
    loss.register_hook(lambda gradient: gradient * math.nan)
    return loss


if __name__ == "__main__":
    kind, rank, step = os.environ.get("MM_FAULT", "none:0:0").split(":")
    if rank == os.environ.get("RANK") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and kind != "none":
        inject(kind, int(step))
    main()

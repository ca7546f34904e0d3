"""Several gloo ranks of one program, made by fork: torch is loaded once, and a launch costs a tenth of a second."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmcore.distributed.mesh import World
from tests.helpers.ranks import free_port

TIMEOUT = 180.0  # these are seconds of a machine that may be busy


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT,
              may_die: bool = False, connect: bool = True) -> list[Any]:  # fmt: skip
    """Call `work(world, *arguments)` on `size` ranks and return what each gave (what JSON can hold).

    A world of one runs without torch.distributed. connect=False leaves connecting to the work; the environment is as
    torchrun makes it. may_die: the result of a rank that a signal killed is the signal's
    negative number; otherwise that, like an exception, ends this program with the rank's traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        children = [_fork(rank, size, work, arguments, Path(folder), port, connect) for rank in range(size)]
        end, statuses = time.monotonic() + timeout, {}
        while len(statuses) < size:
            for rank, child in enumerate(children):
                if rank not in statuses:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        statuses[rank] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                for rank in set(range(size)) - set(statuses):
                    os.kill(children[rank], signal.SIGUSR1)  # says where it stands
                    time.sleep(0.5)
                    os.kill(children[rank], signal.SIGKILL)
                    os.waitpid(children[rank], 0)
                raise SystemExit(f"{size} ranks did not end within {timeout:.0f} s: they wait for one another")
            time.sleep(0.005)
        results = []
        for rank in range(size):
            answer = Path(folder) / f"result-{rank}"
            if statuses[rank] < 0 and may_die:
                results.append(statuses[rank])
            elif statuses[rank] or not answer.exists():
                raise SystemExit(f"rank {rank} of {size} ended with {statuses[rank]}")
            else:
                results.append(json.loads(answer.read_text()))
        return results


def _fork(rank: int, size: int, work: Callable[..., Any], arguments: tuple, folder: Path, port: int,
          connect: bool) -> int:  # fmt: skip
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        if size > 1 and connect:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
                                    timeout=timedelta(seconds=30))  # fmt: skip
        result = work(World(rank, size, rank), *arguments)
        (folder / f"result-{rank}.part").write_text(json.dumps(result))
        os.rename(folder / f"result-{rank}.part", folder / f"result-{rank}")
        status = 0
    except BaseException:
        print(f"rank {rank} of {size}:", file=sys.stderr)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

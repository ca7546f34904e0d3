"""Several gloo ranks on this machine, started as torchrun would start them."""

from __future__ import annotations

import faulthandler
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(
    work: Callable[..., Any], ranks: int, *arguments: Any, per_node: int | None = None, seconds: float = 300
) -> list[Any]:
    """Call `work(*arguments)`, a function of a module, in `ranks` processes; what each returns, in their order.

    A rank that takes longer than `seconds` says where it is and ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        try:
            mp.spawn(_start, (work, ranks, per_node or ranks, free_port(), files, seconds, arguments), nprocs=ranks)
        except ProcessException as error:  # names one that lost its connection, perhaps, and not the one that failed first
            failed = sorted(Path(folder).glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
            raise AssertionError(failed[0].read_text() if failed else str(error)) from None
        return [pickle.loads(file.read_bytes()) for file in files]


def _start(rank, work, ranks, per_node, port, files, seconds, arguments) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(seconds, exit=True)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        files[rank].write_bytes(pickle.dumps(work(*arguments)))
    except BaseException:
        files[rank].with_suffix(".failed").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise

"""Several gloo ranks on this machine, started as torchrun would start them."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_ranks(work: Callable[..., Any], ranks: int, *arguments: Any, per_node: int | None = None) -> list[Any]:
    """Call `work(*arguments)`, a function of a module, in `ranks` processes; what each returns, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        mp.spawn(_start, (work, ranks, per_node or ranks, free_port(), files, arguments), nprocs=ranks)
        return [pickle.loads(file.read_bytes()) for file in files]


def _start(rank, work, ranks, per_node, port, files, arguments) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    files[rank].write_bytes(pickle.dumps(work(*arguments)))

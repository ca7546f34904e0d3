"""Choosing the implementation of a kernel.

Every kernel takes `implementation="auto"` or a name. A name is obeyed or refused with the reason: nothing
falls back in silence. "auto" takes the first of the kernel's preferences that can run on the tensors' device.
The choice can be forced for a whole process with MM_KERNELS=reference (or blocked, cpu, triton).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from mmcore.errors import ConfigError, HardwareError
from mmcore.kernels import native


def why_not(name: str, device: torch.device) -> str | None:
    """The reason why implementation `name` cannot run on `device`, or None where it can."""
    if name == "cpu":
        if device.type != "cpu":
            return f"the compiled CPU kernels cannot read tensors on {device}"
        return native.why_not()
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels need a CUDA device, and the tensors are on {device}"
    return None


def choose(op: str, table: dict[str, Callable], requested: str, device: torch.device) -> Callable:
    """The function for `op`: `table` maps implementation names to functions, in order of preference.

    Raises ConfigError for a name the op does not have, HardwareError for one that cannot run here.
    """
    if requested == "auto":
        requested = os.environ.get("MM_KERNELS", "auto")
    if requested == "auto":
        return next(function for name, function in table.items() if why_not(name, device) is None)
    if requested not in table:
        raise ConfigError(f"{op} has no implementation {requested!r}: choose one of auto, {', '.join(table)}")
    reason = why_not(requested, device)
    if reason:
        raise HardwareError(f"{op} cannot run as {requested!r}: {reason}")
    return table[requested]

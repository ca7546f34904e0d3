"""Choosing the implementation of a kernel.

Every kernel takes `implementation="auto"` or a name. A name is obeyed or refused with the reason: nothing
falls back in silence. "auto" takes the first of the kernel's preferences that can run on the tensors' device.
The choice can be forced for a whole process with MM_KERNELS=reference (or blocked, cpu, triton), which is read once,
when this module is imported. Decoding chooses some 10 times a layer and token, and torch.compile traces `choose`: it is
comparisons of strings and no more.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import torch

from mmcore.errors import ConfigError, HardwareError
from mmcore.kernels import native

NAMES = ("auto", "reference", "blocked", "cpu", "triton")
_FORCED = os.environ.get("MM_KERNELS", "auto")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_NO_COMPILER = native.why_not() if _FORCED in ("auto", "cpu") else None
_NO_TRITON = None if importlib.util.find_spec("triton") else "the package triton is not installed: pip install triton"


def why_not(name: str, device: torch.device) -> str | None:
    """The reason why implementation `name` cannot run on `device`, or None where it can."""
    kind = device.type
    if name == "cpu":
        return _NO_COMPILER if kind == "cpu" else f"the compiled CPU kernels cannot read tensors on {kind}"
    if name == "triton":
        if kind != "cuda" and not _INTERPRETED:
            return f"Triton kernels need a CUDA device, and the tensors are on {kind}"
        return _NO_TRITON
    return None


def excluded(name: str) -> str | None:
    """The reason why what is not named by its user may not take implementation `name`, or None."""
    return None if _FORCED in ("auto", name) else f"MM_KERNELS asks for {_FORCED!r}"


def refusal(name: str, device: torch.device) -> str | None:
    """The reason why what is not named by its user may not take implementation `name` or cannot on `device`, or None."""
    return excluded(name) or why_not(name, device)


def autocasting(kind: str) -> bool:
    """Whether autocast is on for devices of a kind. The meta device knows no autocast, and PyTorch refuses to be asked."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def notice() -> str | None:
    """What the user of a CPU should know where compiled kernels are wanted and cannot be had, or None."""
    if _FORCED != "auto" or _NO_COMPILER is None:
        return None
    return f"PyTorch's own products and loops do the work of the compiled kernels, slower: {_NO_COMPILER}"


def choose(
    op: str, table: dict[str, Callable], requested: str, device: torch.device, fusible: bool = False
) -> Callable:
    """The function for `op`: `table` maps implementation names to functions, in order of preference.

    `fusible`: while torch.compile traces for a GPU, "auto" takes the definition ("reference"), which the compiler
    fuses with its neighbours: a norm with the addition and the conversion before it saves a read that no kernel of ours
    can save. Raises ConfigError for a name the op does not have, HardwareError for one that cannot run here.
    """
    if requested == "auto":
        requested = _FORCED
    if requested == "auto":
        kind = device.type
        if fusible and kind == "cuda" and torch.compiler.is_compiling():
            return table["reference"]
        for name, function in table.items():
            # Triton's interpreter is for tests that ask for it by name.
            if why_not(name, device) is None and (name != "triton" or kind == "cuda"):
                return function
    if requested not in table:
        raise ConfigError(f"{op} has no implementation {requested!r}: choose one of auto, {', '.join(table)}")
    reason = why_not(requested, device)
    if reason:
        raise HardwareError(f"{op} cannot run as {requested!r}: {reason}")
    return table[requested]

"""Launching Triton kernels: in which configuration, on which device.

Imports triton: only the `triton.py` of a kernel imports this.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Python on the CPU (tests): no timing of configurations, no tensor cores."""


class Tuned:
    """A kernel with the configurations that it may run in, the safest guess first.

    The first call with a new `key` (names of kernel arguments; dtypes count by themselves) times them all, later ones
    take the fastest. Timing may choose otherwise tomorrow, and another tile is another order of summation: under
    torch.use_deterministic_algorithms, or with MM_AUTOTUNE=0, the first configuration always runs.
    """

    def __init__(self, kernel: Callable, configs: Sequence[triton.Config], key: Sequence[str]) -> None:
        self._kernel = kernel
        self.configs = list(configs)
        alone = INTERPRETED or len(configs) == 1 or os.environ.get("MM_AUTOTUNE") == "0"
        self._tuner = None if alone else triton.autotune(configs=self.configs, key=list(key))(kernel)

    def __call__(self, grid: tuple | Callable, *arguments, on: Tensor, **constants) -> None:
        """Launch on the device of `on`; `grid` is a tuple, or a function of the kernel's constants."""
        with _device_of(on):
            if self._tuner is None or torch.are_deterministic_algorithms_enabled():
                self._kernel[grid](*arguments, **constants, **self.configs[0].all_kwargs())
            else:
                self._tuner[grid](*arguments, **constants)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; one that is right already is left alone, for it costs microseconds."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def bucket(length: int) -> int:
    """The power of two at or above `length`: what configurations are timed for."""
    return 1 << max(0, length - 1).bit_length()


def processors(x: Tensor) -> int:
    """Multiprocessors of the device of `x`; a number for a small card where there is none."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4

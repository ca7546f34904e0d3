"""Launching Triton kernels: in which configuration, on which device.

Imports triton: only the `triton.py` of a kernel imports this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

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
        self._exact = () if alone else [place for place, name in enumerate(kernel.arg_names) if name in key]
        self._known: dict[tuple, _Launch] = {}
        self._first = threading.Lock()  # an autotuner's state is one for all threads

    def __call__(self, grid: tuple | Callable, *arguments, on: Tensor, **constants) -> None:
        """Launch on the device of `on`; `grid` is a tuple, or a function of the kernel's constants."""
        with _device_of(on):
            case = self._case(arguments, on, constants)
            launch = self._known.get(case)
            if launch is not None:
                launch(grid, arguments)
                return
            with self._first:
                compiled, config = self._search(grid, arguments, constants)
                if compiled is not None:
                    known = constants | config.kwargs
                    last = [known[name] for name in self._kernel.arg_names[len(arguments) :]]
                    self._known[case] = _Launch(compiled, known, last)

    def _search(self, grid: tuple | Callable, arguments: tuple, constants: dict) -> tuple[Any, triton.Config]:
        """Launch as Triton does. Returns the compiled kernel, None in the interpreter, and its configuration."""
        if self._tuner is None or torch.are_deterministic_algorithms_enabled():
            config = self.configs[0]
            return self._kernel[grid](*arguments, **constants, **config.all_kwargs()), config
        compiled = self._tuner[grid](*arguments, **constants)
        return compiled, self._tuner.best_config

    def _case(self, arguments: tuple, on: Tensor, constants: dict) -> tuple:
        """What Triton's choice of a compiled kernel, and ours of a configuration, depend on for arguments that are tensors,
        ints and floats. Of numbers only the kind, as Triton asks: the lengths of prompts must not make this table grow."""
        exact = [arguments[place] for place in self._exact if place < len(arguments)]
        kinds = [
            (n == 1) + 2 * (n % 16 == 0) + 4 * (not -(2**31) <= n < 2**31) if type(n) is int
            else _kind(n) if isinstance(n, Tensor)
            else type(n)
            for n in arguments
        ]  # fmt: skip
        return torch.are_deterministic_algorithms_enabled(), on.get_device(), *exact, *kinds, *constants.items()


def _kind(x: Tensor) -> tuple:
    if torch.version.hip is None:
        return x.dtype, x.data_ptr() % 16 == 0
    return x.dtype, x.data_ptr() % 16 == 0, x.untyped_storage().size() < 2**31  # addressed with 32 bits there


@dataclasses.dataclass(frozen=True)
class _Launch:
    """A kernel that Triton has compiled. Left to itself Triton finds it anew at every launch, by each of up to fifty
    arguments: 50 us of the host for the memories' kernels, and a layer has 22 of them in a training step."""

    compiled: Any
    constants: dict[str, Any]
    last: list[Any]
    """The constants once more, as the kernel's last parameters."""

    def __call__(self, grid: tuple | Callable, arguments: tuple) -> None:
        sizes = grid(self.constants) if callable(grid) else grid
        self.compiled[(*sizes, 1, 1)[:3]](*arguments, *self.last)


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

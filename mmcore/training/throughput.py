"""Speed and memory of a run: tokens per second, the device's peak, memory in use."""

from __future__ import annotations

import time
from collections import deque

import psutil
import torch

from mmcore import planning


def peak_flops(device: torch.device, precision: str) -> float:
    """The device's peak of matrix products in FLOP/s: published for known GPUs, else measured in ~0.3 s.

    A CPU's peak is measured because it follows the clock, which is not known, and the threads in use.
    """
    if device.type == "cuda":
        published = planning.machine_here().peaks.get(planning.peak_name(precision))
        if published:
            return published
    return measured_flops(device, torch.float32 if precision == "fp32" else torch.bfloat16)


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the best of several square matrix products (1024 on a CPU: past 512 the rate is flat there)."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.rand(size, size, device=device, dtype=dtype)
    b = torch.rand(size, size, device=device, dtype=dtype)
    out = a @ b  # the first product pays for warming up
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        torch.matmul(a, b, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for the GPU's queue; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_in_use(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class Meter:
    """Seconds and tokens of training steps alone: `start` and `stop` bracket a step, so that validation and
    saving never count. Rates are over the latest `window` steps."""

    def __init__(self, window: int = 20):
        self.seconds = 0.0
        """Of all steps, those of earlier sessions included once a checkpoint was loaded."""
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._started = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self, tokens: int) -> None:
        """A step over `tokens` tokens is done."""
        seconds = time.perf_counter() - self._started
        self.seconds += seconds
        # The first step compiles, builds kernels and maps memory: it would spoil the rate for a whole window
        if len(self._steps) == 1 and self._steps[0][0] > 1.5 * seconds:
            self._steps.clear()
        self._steps.append((seconds, tokens))

    @property
    def seconds_per_step(self) -> float:
        return sum(s for s, _ in self._steps) / len(self._steps) if self._steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        total = sum(s for s, _ in self._steps)
        return sum(t for _, t in self._steps) / total if total else 0.0

"""Speed and memory of a run: tokens per second, the device's peak, memory in use."""

from __future__ import annotations

import time
from collections import deque

import psutil
import torch

# Dense peak of matrix products in FLOP/s as published: (bf16 with fp32 sums, plain fp32), by a part of the name
PEAKS = {
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H800": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "A40": (150e12, 37.4e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "RTX 6000 Ada": (364e12, 91.1e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def peak_flops(device: torch.device, precision: str) -> float:
    """The device's peak of matrix products in FLOP/s: published for known GPUs, else measured in ~0.3 s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part in sorted(PEAKS, key=len, reverse=True):  # "H100 PCIe" before "H100"
            if part in name:
                return PEAKS[part][0 if precision == "bf16" else 1]
    return measured_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)


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

"""Times and bytes on a GPU, or, to try a benchmark out, on a CPU."""

from __future__ import annotations

import dataclasses
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

CLOCK = 2e9  # of a multiprocessor, about, in Hz


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how large: `tiny` shrinks every shape to what a CPU, with Triton's interpreter, does in seconds."""

    device: torch.device
    tiny: bool
    warm: bool = False
    """Everything once and untimed, for what the compilers then keep on disk: parts side by side fill all cores with it."""
    share: tuple[int, int] = (0, 1)
    """Which of how many processes this is, where several share a sweep."""

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: Any, tiny: Any) -> Any:
        return tiny if self.tiny else full

    @property
    def form(self) -> str:
        """The implementation of kernels that is measured."""
        return "triton" if self.gpu or self.tiny else "auto"

    def sync(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give back what earlier parts have held."""
        import gc

        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.gpu else 0


def seconds(place: Place, work: Callable[[], Any], budget: float = 0.3) -> float:
    """Median seconds that the device is busy with `work`, the level-2 cache cleared before each run; as many runs as take
    `budget` seconds.

    The device sleeps until the host has enqueued the run: on an H200's host a call of three kernels took 0.3 ms to
    launch, and short kernels were measured as that.
    """
    if place.warm or not place.gpu:
        start = time.perf_counter()
        work()
        place.sync()
        return time.perf_counter() - start
    work()
    place.sync()
    start = time.perf_counter()
    work()
    launched = time.perf_counter() - start
    place.sync()
    once = max(time.perf_counter() - start, 1e-6)
    runs = max(3, min(200, int(budget / (once + 2 * launched))))
    cache = torch.empty(2**28, dtype=torch.int8, device=place.device)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for before, after in marks:
        cache.zero_()
        torch.cuda._sleep(int(2 * launched * CLOCK))
        before.record()
        work()
        after.record()
    place.sync()
    return statistics.median(before.elapsed_time(after) for before, after in marks) / 1e3


def backward_seconds(place: Place, work: Callable[[], Tensor], leaves: Iterable[Tensor], upstream: Tensor) -> float:
    """Seconds of the backward pass alone of `work`, again and again through one graph."""
    out, leaves = work(), [leaf for leaf in leaves if leaf.requires_grad]
    return seconds(place, lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))


def copy_bandwidth(place: Place) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(place.pick(2**30, 2**20), dtype=torch.int8, device=place.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(place, lambda: target.copy_(source))


def costliest(place: Place, work: Callable[[], Any], count: int = 80) -> dict[str, list[float]]:
    """The kernels that `work` spends most of the device's time in: {name: [ms, launches]}, longest first."""
    if place.warm or not place.gpu:
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        place.sync()
    spent = sorted(((e.self_device_time_total / 1e3, e.count, e.key) for e in profile.key_averages()), reverse=True)
    return {"all": [sum(ms for ms, _, _ in spent), sum(n for _, n, _ in spent)]} | {
        name[:120]: [ms, n] for ms, n, name in spent[:count]
    }


def attempt(report: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """report[name] = work(), or the error's last line; its traceback is printed and the rest goes on."""
    try:
        result = work()
    except Exception as error:  # noqa: BLE001  one rival that fails must not cost the visit
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    report[name] = result
    print(f"  {name}: {brief(result)}", flush=True)
    return result


def brief(result: Any) -> str:
    if isinstance(result, dict):
        return "  ".join(f"{key} {brief(value)}" for key, value in result.items() if not isinstance(value, (dict, list)))
    return f"{result:.4g}" if isinstance(result, float) else str(result)

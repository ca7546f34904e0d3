"""Every configuration of the kernels that matter most, each timed by itself (parts s, r and q of a visit).

What `Tuned` picks at run time comes from short lists; this is where the lists come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels import tuning
from tests.benchmarks.gpu_timing import Place, attempt, seconds

SCANS = {"whole heads": (8, 4096, 32, 128), "few heads": (3, 4096, 16, 128)}
READ = (8, 4096, 32, 128)
READS = {"causal": (None, 0), "window": (256, 1)}
FORWARD = "128 64 8 3\n128 64 8 2\n128 128 8 2\n128 128 8 3\n64 64 4 3\n64 64 4 2\n128 64 4 3\n64 128 4 2\n128 32 4 3\n64 32 4 4"
BACKWARD = ("64 64 64 4 2\n64 64 64 4 3\n128 64 64 8 2\n128 64 64 8 3\n64 32 32 4 3\n64 32 64 4 3\n64 64 32 4 3\n"
            "128 64 128 8 2\n128 32 64 8 3")  # fmt: skip


def scan(place: Place, report: dict[str, Any]) -> None:
    """gated_scan by pieces walked side by side and registers of a thread, and for few heads by the programs of a
    multiprocessor that segments aim at; in ms."""
    from mmcore.kernels.gated_scan import triton as kernel

    names = {"summary": kernel.summary_kernel, "forward": kernel.forward_kernel, "backward": kernel.backward_kernel}
    before = kernel._tuned, kernel.PROGRAMS
    forms = [(1, None), (4, None), (4, 168), (8, None), (8, 128), (16, None)]
    choices = [(form, programs) for form in forms for programs in (1, 2, 4)]
    for (pieces, registers), programs in mine(place, place.pick(choices, [((2, None), 2)])):

        def tuned(which: str, width: int, _, pieces=pieces, registers=registers) -> tuning.Tuned:
            return tuning.Tuned(names[which], [kernel._config(width, pieces, registers)], ())

        kernel._tuned, kernel.PROGRAMS = tuned, programs
        shapes = place.pick(SCANS, {"few heads": (1, 40, 2, 16)})
        for name, shape in shapes.items() if programs == 2 else [("few heads", shapes["few heads"])]:

            def times(shape=shape) -> dict[str, float]:
                B, T, H, _ = shape
                raw, upstream = (numbers(place, *shape) for _ in range(2))
                gates, decays = numbers(place, B, T, H), -numbers(place, B, T, H).abs()
                resets = torch.rand(B, T, device=place.device) < 1 / 800
                inputs = (raw, gates, decays, resets)
                kept = kernel._run(*inputs, None, None, True)[3:]
                return {
                    "forward_ms": 1e3 * seconds(place, lambda: kernel._run(*inputs, None, None, True)),
                    "prepare_ms": 1e3 * seconds(place, lambda: kernel._prepare(*inputs[1:], None)),
                    "backward_ms": 1e3 * seconds(place, lambda: kernel._run_backward(upstream, raw, gates, decays, *kept)),
                }

            attempt(report, f"{name}: {pieces} pieces, {registers} registers, {programs} programs", times)
    kernel._tuned, kernel.PROGRAMS = before


def read_forward(place: Place, report: dict[str, Any]) -> None:
    """memory_read's forward pass by queries M, pairs N, warps and stages; in ms."""
    from mmcore.kernels.memory_read import triton as kernel

    before = kernel._reader
    for line in mine(place, place.pick(FORWARD, "32 16 4 1").split("\n")):
        one = tuning.Tuned(kernel._forward_kernel, kernel.configs("M N", line), ())
        kernel._reader = lambda width, narrow, one=one: one
        for name, (window, delay) in READS.items():
            keys, values, scalars, _ = _read_inputs(place)
            attempt(report, f"{name}: {line}", lambda window=window, delay=delay, keys=keys, values=values, scalars=scalars: {
                "ms": 1e3 * seconds(place, lambda: kernel._run(keys, values, *scalars, None, None, window, delay, 0))
            })  # fmt: skip
    kernel._reader = before


def read_backward(place: Place, report: dict[str, Any]) -> None:
    """memory_read's backward pass by rows R, queries, pairs, warps and stages; in ms."""
    from mmcore.kernels.memory_read import triton as forward
    from mmcore.kernels.memory_read import triton_backward as kernel

    before = kernel._gatherer
    for line in mine(place, place.pick(BACKWARD, "32 16 16 4 1").split("\n")):
        one = tuning.Tuned(kernel._backward_kernel, kernel.configs("R QB KB", line), ())
        kernel._gatherer = lambda width, narrow, one=one: one
        for name, (window, delay) in READS.items():
            keys, values, scalars, upstream = _read_inputs(place)
            kept = forward._run(keys, values, *scalars, None, None, window, delay, 0)
            arguments = (upstream, keys, values, *scalars, None, None, window, delay, 0, *kept)
            attempt(report, f"{name}: {line}", lambda arguments=arguments: {
                "ms": 1e3 * seconds(place, lambda: kernel.run_backward(*arguments))
            })  # fmt: skip
    kernel._gatherer = before


def mine(place: Place, choices: list[Any]) -> Iterator[Any]:
    """The choices of this process, where several share them out."""
    yield from choices[place.share[0] :: place.share[1]]


def numbers(place: Place, *shape: int) -> Tensor:
    return torch.randn(shape, device=place.device).to(torch.float32 if place.tiny else torch.bfloat16)


def _read_inputs(place: Place) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    B, T, H, D = place.pick(READ, (1, 40, 1, 16))
    keys = F.normalize(numbers(place, B, T, H, D), dim=-1)
    scalars = [torch.full((H,), x, device=place.device) for x in (4.5, 4.5, 1 / 3)]
    return keys, numbers(place, B, T, H, D), scalars, numbers(place, B, T, H, D)

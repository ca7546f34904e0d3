"""Every configuration of the kernels that matter most, each timed by itself (parts s, r and q of a visit).

What `Tuned` picks at run time comes from short lists; this is where the lists come from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels import tuning
from tests.benchmarks.gpu_timing import Place, attempt, copy_bandwidth, seconds

SCANS = {"whole heads": (8, 4096, 32, 128), "few heads": (3, 4096, 16, 128)}
READ = (8, 4096, 32, 128)
READS = {"causal": (None, 0), "window": (256, 1)}
FORWARD = "128 64 8 3\n128 64 8 2\n128 128 8 2\n128 128 8 3\n64 64 4 3\n64 64 4 2\n128 64 4 3\n64 128 4 2\n128 32 4 3\n64 32 4 4"
BACKWARD = ("64 64 64 4 2\n64 64 64 4 3\n128 64 64 8 2\n128 64 64 8 3\n64 32 32 4 3\n64 32 64 4 3\n64 64 32 4 3\n"
            "128 64 128 8 2\n128 32 64 8 3")  # fmt: skip


def scan(place: Place, report: dict[str, Any]) -> None:
    """gated_scan's walk by pieces side by side, and for few heads by the programs of a multiprocessor that segments aim at;
    in ms."""
    from mmcore.kernels.gated_scan import triton as kernel

    names = {"summary": kernel.summary_kernel, "forward": kernel.forward_kernel, "backward": kernel.backward_kernel}
    before = kernel._tuned, kernel.PROGRAMS, kernel.FORM
    kernel.FORM = "walk"
    choices = [(pieces, programs) for pieces in (2, 4, 8) for programs in (2, 4, 8)]
    for pieces, programs in mine(place, place.pick(choices, [(2, 2)])):

        def tuned(which: str, width: int, _, pieces=pieces) -> tuning.Tuned:
            return tuning.Tuned(names[which], [kernel._config(width, pieces)], ())

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

            attempt(report, f"{name}: {pieces} pieces, {programs} programs", times)
    kernel._tuned, kernel.PROGRAMS, kernel.FORM = before


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


PRODUCTS = {1: "4 1024 3 4\n4 1024 4 4\n4 512 4 4\n4 2048 2 4\n8 512 3 4", 16: "64 64 4 4\n32 128 4 4\n64 128 3 4"}
"""By the rows of x that a program takes: rows of W, columns, stages, warps."""


def step(place: Place, report: dict[str, Any]) -> None:
    """The products of a decoding step of the 1.5b shape in bf16, each kind with each configuration and beside the library's,
    weights from memory: ms, and the share of a copy's bandwidth."""
    import triton

    from mmcore.kernels.mosaic_step import Matrix
    from mmcore.kernels.mosaic_step import triton as kernel

    copy = copy_bandwidth(place)
    d, inner, words = place.pick((2048, 6144, 128_256), (32, 48, 61))
    norm = torch.rand(d, device=place.device)
    shapes = {"project": (4 * d, d, False, True), "out": (d, 2 * d, False, False), "inner": (inner, d, True, True),
              "down": (d, inner, False, False), "classify": (words, d, False, True)}  # fmt: skip
    for kind, (out, width, gated, normed) in list(shapes.items())[: 1 if place.warm else None]:
        weights = [numbers(place, out, width) for _ in range(1 + gated)]
        for rows, block in place.pick([(1, 1), (8, 16)], [(1, 1)]):
            x, result = torch.randn(rows, width, device=place.device), torch.empty(rows, out, device=place.device)
            taken = sum(weight.numel() * weight.element_size() for weight in weights)
            narrow = x.to(weights[0].dtype)

            def timed(work, taken=taken) -> dict[str, float]:
                spent = seconds(place, work, 0.04)
                return {"ms": 1e3 * spent, "of_copy": taken / spent / copy}

            work = functools.partial(lambda x, weights: [F.linear(x, weight) for weight in weights], narrow, weights)
            attempt(report, f"{kind} {rows} library", functools.partial(timed, work))
            for line in place.pick(PRODUCTS[block], "64 64 1 4").split("\n"):
                n, k, stages, warps = map(int, line.split())
                products = kernel._Products([tuple(Matrix(weight) for weight in weights)], norm if normed else None)
                config = triton.Config({"N": n, "K": k, "STAGES": stages}, num_warps=warps, num_stages=1)
                products._tuned[block] = tuning.Tuned(kernel.product_kernel, [config], ())
                given = (products._all, x, result, weights[0].dtype, 1e-5, False, products.norm if rows == 1 else None)
                work = functools.partial(products._launch, *given)
                attempt(report, f"{kind} {rows} by {block}: {line}", functools.partial(timed, work))


SHARES = "64 4 4 4\n64 4 2 4\n64 4 3 4\n32 4 4 4\n32 2 4 4\n128 4 2 4\n64 4 2 8\n32 4 4 8\n64 4 3 3"


def shares(place: Place, report: dict[str, Any]) -> None:
    """What a new key of each row reads of both memories of a layer, by pairs N, warps, stages, and the programs of a
    multiprocessor that a memory's shares aim at: ms after 4,096 and 32,768 tokens of one row, and 4,096 of 32."""
    import triton

    from mmcore.kernels.mosaic_step import triton as kernel

    H, D, W = place.pick((16, 128, 256), (2, 16, 9))
    kind = kernel._TYPES[torch.float32 if place.tiny else torch.bfloat16]
    for rows, context in place.pick([(1, 4096), (1, 32_768), (32, 4096)], [(1, 40)]):
        reads = [min(context, 4 * W), context]
        pairs = [[numbers(place, rows, count, H, D) for _ in range(2)] for count in reads]
        query, scalars = numbers(place, rows, 1, H, D), torch.full((H,), 4.0, device=place.device)
        clocks = [torch.tensor([count - 1], device=place.device) for count in reads]
        table = torch.tensor([
            [0, 0, query.data_ptr(), 0, keys.data_ptr(), values.data_ptr(), clock.data_ptr(), 0, 0, *[scalars.data_ptr()] * 3,
             keys.stride(0), window, delay, 0]
            for (keys, values), clock, window, delay in zip(pairs, clocks, (W, 1 << 30), (1, 64), strict=True)
        ], device=place.device)  # fmt: skip
        for line in mine(place, place.pick(SHARES, "16 4 1 4").split("\n")):
            n, warps, stages, programs = map(int, line.split())
            one = tuning.Tuned(kernel.share_kernel, [triton.Config({"N": n}, num_warps=warps, num_stages=stages)], ())
            wanted = max(1, programs * tuning.processors(query) // (rows * H))
            short, far = (max(1, min(wanted, -(-reach // n))) for reach in (W, context))
            sums, totals, tops = (torch.empty(rows * H, short + far, *size, device=place.device) for size in ((D,), (), ()))
            work = functools.partial(
                one, (short + far, rows * H), table, table, sums, totals, tops, H, D, short, on=query, M=16, STARTS=False,
                PRECISION="tf32", EVEN=True, ALIGNED=True, D=D, PAIRS=kind, WAITING=kind,
            )  # fmt: skip
            attempt(report, f"{rows} x {context}: {line}", lambda work=work: {"ms": 1e3 * seconds(place, work, 0.04)})


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

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
from mmcore.kernels.mosaic_step import Matrix
from tests.benchmarks.gpu_timing import Place, attempt, copy_bandwidth, seconds

SCANS = {"many heads": (8, 4096, 32, 128), "few heads": (3, 4096, 16, 128)}
READ = (8, 4096, 32, 128)
READS = {"causal": (None, 0), "window": (256, 1)}
FORWARD = "128 64 8 3\n128 64 8 2\n128 128 8 2\n128 128 8 3\n64 64 4 3\n64 64 4 2\n128 64 4 3\n64 128 4 2\n128 32 4 3\n64 32 4 4"
BACKWARD = ("64 64 64 4 2\n64 64 64 4 3\n128 64 64 8 2\n128 64 64 8 3\n64 32 32 4 3\n64 32 64 4 3\n64 64 32 4 3\n"
            "128 64 128 8 2\n128 32 64 8 3")  # fmt: skip


STRETCHES = "4 128 1\n4 128 4\n4 128 16\n8 128 1\n8 128 4\n2 128 4\n4 168 1\n4 168 4\n4 168 16\n2 168 1\n2 168 4\n8 128 16"
"""Chunks of a stretch, registers, stretches of a group."""


def scan(place: Place, report: dict[str, Any]) -> None:
    """gated_scan by STRETCHES; in ms."""
    from mmcore.kernels.gated_scan import triton as kernel

    before = kernel.STRETCH, kernel.GROUPS
    for line in mine(place, place.pick(STRETCHES, "2 128 2").split("\n")):
        pieces, registers, group = map(int, line.split())
        kernel.STRETCH, kernel.GROUPS = dict.fromkeys(before[0], (pieces, registers)), (group, group)
        for name, shape in place.pick(SCANS, {"few heads": (1, 40, 2, 16)}).items():

            def times(shape=shape) -> dict[str, float]:
                B, T, H, _ = shape
                raw, upstream = (numbers(place, *shape) for _ in range(2))
                gates, decays = numbers(place, B, T, H), -numbers(place, B, T, H).abs()
                resets = torch.rand(B, T, device=place.device) < 1 / 800
                inputs = (raw, gates, decays, resets)
                kept = kernel._run(*inputs, None, None, True)[3:]
                return {
                    "forward_ms": 1e3 * seconds(place, lambda: kernel._run(*inputs, None, None, True)),
                    "prepare_ms": 1e3 * seconds(place, lambda: kernel._prepare(*inputs[1:], None, 1)),
                    "backward_ms": 1e3 * seconds(place, lambda: kernel._run_backward(upstream, raw, gates, decays, *kept)),
                }

            attempt(report, f"{name}: {line}", times)
    kernel.STRETCH, kernel.GROUPS = before


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
    five_products(place, report)


FIVE = "128 64 8 2 3\n128 64 8 2 1\n128 64 8 2 0\n128 64 8 3 3\n128 32 8 3 3\n64 64 4 2 3\n64 64 4 2 0"
"""Keys R, queries, warps, stages, and the sums that gradients of bandwidths are made of."""


def five_kernels(lines: str) -> Iterator[tuple[tuning.Tuned, int]]:
    """The candidate's kernel in each configuration, and its sums."""
    from mmcore.kernels.memory_read import triton as forward
    from tests.benchmarks import gpu_candidates

    for line in lines.split("\n"):
        lengths, sums = line.rsplit(" ", 1)
        yield gpu_candidates.columns(*forward.configs("R QB", lengths)), int(sums)


def five_products(place: Place, report: dict[str, Any]) -> None:
    """The same pass in the form of gpu_candidates, which adds to memory; in ms, and how far it is off ours (of the norm)."""
    from mmcore.kernels.memory_read import triton as forward
    from mmcore.kernels.memory_read.triton_backward import run_backward
    from tests.benchmarks import gpu_candidates

    for line in mine(place, place.pick(FIVE, "32 16 4 1 3").split("\n")):
        ((gather, sums),) = five_kernels(line)
        for name, (window, delay) in READS.items():

            def times(gather=gather, sums=sums, window=window, delay=delay) -> dict[str, float]:
                keys, values, scalars, upstream = _read_inputs(place)
                kept = forward._run(keys, values, *scalars, None, None, window, delay, 0)
                given = gather, upstream, keys, values, scalars, window, delay, *kept, sums
                found = {"ms": 1e3 * seconds(place, lambda: gpu_candidates.run_backward(*given))}
                *ours, bandwidths, _ = run_backward(upstream, keys, values, *scalars, None, None, window, delay, 0, *kept)
                *theirs, betas = gpu_candidates.run_backward(*given)
                if sums == 3:  # of three bandwidths the base's is the sum
                    ours, theirs = [*ours, bandwidths[0]], [*theirs, betas.sum((0, 2))]
                off = [(a.float() - b.float()).norm() / a.float().norm() for a, b in zip(ours, theirs, strict=True)]
                return found | {"off": [round(float(x), 7) for x in off]}

            attempt(report, f"{name}, five products: {line}", times)


PRODUCTS = {
    "bf16": {1: "4 1024 3 4\n4 1024 4 4\n4 512 4 4\n4 2048 2 4\n8 512 3 4", 16: "64 64 4 4\n32 128 4 4\n64 128 3 4"},
    "int8": {1: "4 1024 3 4\n4 1024 4 4\n4 2048 3 4\n8 1024 3 4\n8 2048 2 4\n4 2048 2 8"},
}
"""By the weights' format and the rows of x that a program takes: rows of W, columns, stages, warps."""


def step(place: Place, report: dict[str, Any]) -> None:
    """The products of a decoding step of the 1.5b shape, each kind with each configuration and beside the library's, weights
    from memory: ms, and the share of a copy's bandwidth."""
    copy = copy_bandwidth(place)
    d, inner, words = place.pick((2048, 6144, 128_256), (32, 48, 61))
    norm = torch.rand(d, device=place.device)
    shapes = {"project": (4 * d, d, False, True), "out": (d, 2 * d, False, False), "inner": (inner, d, True, True),
              "down": (d, inner, False, False), "classify": (words, d, False, True)}  # fmt: skip
    for kind, (out, width, gated, normed) in list(shapes.items())[: 1 if place.warm else None]:
        for format, lines in PRODUCTS.items():
            weights = [_matrix(place, out, width, format) for _ in range(1 + gated)]
            for rows, block in place.pick([(1, 1), (8, 16)], [(1, 1)]):
                for line in place.pick(lines.get(block, ""), "64 64 1 4").splitlines():
                    config = [int(word) for word in line.split()]
                    work = functools.partial(_product, place, weights, norm if normed else None, rows, block, config, copy)
                    attempt(report, f"{kind} {format} {rows} by {block}: {line}", work)
                if format == "bf16":
                    work = functools.partial(_product, place, weights, None, rows, block, None, copy)
                    attempt(report, f"{kind} {format} {rows} library", work)


def _matrix(place: Place, out: int, width: int, format: str) -> Matrix:
    if format == "bf16":
        return Matrix(numbers(place, out, width))
    weight = torch.randint(-127, 128, (out, width), dtype=torch.int8, device=place.device)
    return Matrix(weight, torch.rand(out, device=place.device))


def _product(place: Place, weights: list[Matrix], norm: Tensor | None, rows: int, block: int, config: list[int] | None,
             copy: float) -> dict[str, float]:  # fmt: skip
    """One kind of product in one configuration; None: the library's."""
    import triton

    from mmcore.kernels.mosaic_step import triton as kernel

    out, width = weights[0].weight.shape
    x, result = torch.randn(rows, width, device=place.device), torch.empty(rows, out, device=place.device)
    narrow = torch.float32 if place.tiny else torch.bfloat16
    if config is None:
        y = x.to(narrow)
        work = functools.partial(lambda y: [F.linear(y, matrix.weight) for matrix in weights], y)
    else:
        n, k, stages, warps = config
        products = kernel._Products([tuple(weights)], norm)
        config = triton.Config({"N": n, "K": k, "STAGES": stages}, num_warps=warps, num_stages=1)
        products._tuned[block] = tuning.Tuned(kernel.product_kernel, [config], ())
        given = (products._all, x, result, narrow, 1e-5, False, products.norm if rows == 1 else None)
        work = functools.partial(products._launch, *given)
    spent = seconds(place, work, 0.04)
    taken = sum(matrix.weight.numel() * matrix.weight.element_size() for matrix in weights)
    return {"ms": 1e3 * spent, "of_copy": taken / spent / copy}


SHARES = "64 4 2 8 0\n64 4 2 8 96\n64 4 2 4 0\n64 4 3 4 0\n32 4 2 8 0\n32 4 3 4 0\n64 8 2 4 0\n128 8 2 4 0\n64 4 2 3 0"


def shares(place: Place, report: dict[str, Any]) -> None:
    """What a new key of each row reads of both memories of a layer, by pairs N, warps, stages, and the programs of a
    multiprocessor that a memory's shares aim at, and registers at most (0: any): ms after 4,096 and 32,768 tokens of one row,
    and 4,096 of 32."""
    import triton

    from mmcore.kernels.mosaic_step import triton as kernel

    H, D, W = place.pick((16, 128, 256), (2, 16, 9))
    kind = kernel._TYPES[torch.float32 if place.tiny else torch.bfloat16]
    for rows, context in place.pick([(1, 4096), (1, 32_768), (32, 4096)], [(1, 40)]):
        reads = [min(context, 4 * W), context]
        pairs = [[numbers(place, rows, count, H, D) for _ in range(2)] for count in reads]
        scalars = torch.full((H,), 0.5, device=place.device)
        clocks = [torch.tensor([count - 1], device=place.device) for count in reads]
        waiting = [numbers(place, rows, H, D) for _ in range(4)]
        states = [torch.rand(rows, H, *size, device=place.device) for size in ((), (D,))]
        projected = torch.randn(rows, 4 * H * D + 4 * H, device=place.device)
        table = torch.tensor([
            [*(part.data_ptr() for part in (*states, *waiting[2 * m : 2 * m + 2], keys, values, clock)),
             *[scalars.data_ptr()] * 5, keys.stride(0), window, delay, 1]
            for m, ((keys, values), clock, window, delay) in enumerate(zip(pairs, clocks, (W, 1 << 30), (1, 64), strict=True))
        ], device=place.device)  # fmt: skip
        read = numbers(place, rows, 2 * H * D)
        for line in mine(place, place.pick(SHARES, "16 4 1 4 0").split("\n")):
            n, warps, stages, programs, registers = map(int, line.split())
            config = triton.Config({"N": n}, num_warps=warps, num_stages=stages, maxnreg=registers or None)
            one = tuning.Tuned(kernel.read_kernel, [config], ())
            wanted = max(1, programs * tuning.processors(read) // (rows * H))
            short, far = (max(1, min(wanted, -(-reach // n))) for reach in (W, context))
            sums, totals, tops = (torch.empty(rows * H, short + far, *size, device=place.device) for size in ((D,), (), ()))
            arrivals = torch.zeros(2, rows * H + 1, dtype=torch.int32, device=place.device)
            arrivals[:, -1] = -(1 << 30)  # so that clocks stand still
            work = functools.partial(
                one, (short + far, rows * H), table, projected, table, sums, totals, tops, arrivals, read, H, D, short,
                projected.stride(0), on=read, M=16, STARTS=False, PRECISION="tf32", EVEN=True, ALIGNED=True, D=D,
                S=triton.next_power_of_2(max(short, far)), PAIRS=kind, WAITING=kind,
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

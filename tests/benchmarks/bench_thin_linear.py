"""Products of 1 to 16 rows with weights that come from memory: thin_linear and F.linear in GB/s of weights read.

The weights are those of a model of shape S2 (140 MB in fp32, eight times the third-level cache's part for them), so
that each call finds its matrix in memory as a decoder does. Beside them what a plain sum reads in the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmcore.kernels.thin_linear import thin_linear
from tests.benchmarks import common


def layers_of(shape: common.Shape, dtype: torch.dtype) -> list[list[Tensor]]:
    """Weights of every layer, those that share an input together; and the classifier."""
    d, inner, H = shape.hidden_size, shape.intermediate_size, shape.heads
    groups = []
    for _ in range(shape.layers):
        groups += [[(d, d)] * 4 + [(H, d)] * 4, [(d, 2 * d)], [(inner, d)] * 2, [(d, inner)]]
    groups.append([(shape.vocab_size, d)])
    return [[torch.randn(size).to(dtype) for size in group] for group in groups]


def speed(groups: list[list[Tensor]], inputs: dict[int, Tensor], product: Callable) -> Callable[[], float]:
    """A side: bytes a second of one pass over all weights."""
    total = sum(weight.numel() * weight.element_size() for group in groups for weight in group)

    def run() -> float:
        start = time.perf_counter()
        for group in groups:
            product(inputs[group[0].shape[1]], group)
        return total / (time.perf_counter() - start)

    return run


def measure(shape: common.Shape, rows: int, weights: dict[torch.dtype, list[list[Tensor]]], rounds: int) -> dict:
    """GB/s of weights for each side, for `rows` rows of x."""
    widths = {group[0].shape[1] for groups in weights.values() for group in groups}
    inputs = {width: torch.randn(rows, 1, width) for width in widths}
    half_inputs = {width: x.bfloat16() for width, x in inputs.items()}
    fp32, bf16 = weights[torch.float32], weights[torch.bfloat16]

    int8 = weights[torch.int8]
    scales = {len(weight): torch.rand(len(weight)) for group in int8 for weight in group}

    def ours_int8(x: Tensor, group: list[Tensor]) -> None:
        for weight in group:
            thin_linear(x, weight, scales[len(weight)])

    def library(x: Tensor, group: list[Tensor]) -> None:
        for weight in group:
            F.linear(x, weight)

    def ours(x: Tensor, group: list[Tensor]) -> None:
        for weight in group:
            thin_linear(x, weight)

    sides = {
        "sum": lambda: common.read_bandwidth(repeats=1),
        "F.linear fp32": speed(fp32, inputs, library),
        "thin_linear fp32": speed(fp32, inputs, ours),
        "F.linear bf16": speed(bf16, half_inputs, library),
        "thin_linear bf16": speed(bf16, inputs, ours),
        "thin_linear int8": speed(int8, inputs, ours_int8),
    }
    return {name: [value / 1e9 for value in values] for name, values in common.take_turns(sides, rounds).items()}


def overhead(calls: int = 2000) -> dict[str, float]:
    """Microseconds of a call that has next to nothing to compute, the best of many stretches."""
    x, weight = torch.randn(1, 1, 16), torch.randn(8, 16)
    sides = {
        "F.linear": lambda: F.linear(x, weight),
        "thin_linear": lambda: thin_linear(x, weight),
    }
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(calls // 10):
        for name, call in sides.items():
            start = time.perf_counter()
            for _ in range(10):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / 10 * 1e6)
    return best


@torch.inference_mode()
def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="S2")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    arguments = parser.parse_args()
    shape = common.SHAPES[arguments.shape]
    weights = {dtype: layers_of(shape, dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)}
    report = {"environment": common.environment(), "shape": shape, "unit": "GB/s of weights", "rows": {}}
    for rows in arguments.rows:
        values = measure(shape, rows, weights, arguments.rounds)
        figures = {name: common.figure(series) for name, series in values.items()}
        shares = {name: common.ratio(series, values["sum"]) for name, series in values.items()}
        report["rows"][rows] = {name: {"speed": figures[name], "share_of_sum": shares[name]} for name in values}
        print(f"\n{rows} row{'s' if rows > 1 else ''} of x: GB/s of weights, and the share of what a sum reads")
        for name in values:
            print(f"  {name:<20} {figures[name]:6.1f}   {shares[name].median:5.2f}")
    report["microseconds_per_call"] = overhead()
    print("\nmicroseconds of a call with next to nothing to compute")
    for name, value in report["microseconds_per_call"].items():
        print(f"  {name:<20} {value:6.1f}")
    common.write(arguments.json, report)


if __name__ == "__main__":
    main()

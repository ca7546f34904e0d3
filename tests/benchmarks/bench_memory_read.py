"""memory_read in C against its PyTorch blocks, the hand-written block form of a window (rivals.py), and causal attention of
the same shape. All sides take turns in one run: the machine drifts, and only the ratios of a run count.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

from mmcore.kernels.allocator import keep_pages
from mmcore.kernels.memory_read import memory_read
from tests.benchmarks import common, rivals

FORMS = {"window": {"window": 256, "delay": 1}, "long": {"delay": 64}}


def pairs_read(batch: int, length: int, heads: int, place: dict) -> int:
    """Query-pair products, counted as they are read."""
    count = torch.arange(length) - place["delay"] + 1
    if "window" in place:
        count = count.clamp(max=place["window"] - place["delay"])
    return int(count.clamp(min=0).sum()) * batch * heads


def timed(run, upstream, leaves) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    start = time.perf_counter()
    out = run()
    middle = time.perf_counter()
    out.backward(upstream)
    end = time.perf_counter()
    for leaf in leaves:
        leaf.grad = None
    return middle - start, end - middle


def training(shape: tuple[int, int, int, int], repeats: int) -> dict:
    """Forward and backward of both forms, queries being the keys, as in training."""
    batch, length, heads, size = shape
    keys = F.normalize(torch.randn(shape), dim=-1).requires_grad_()
    values, upstream = torch.randn(shape).requires_grad_(), torch.randn(shape)
    bandwidths = [torch.full((heads,), x).requires_grad_() for x in (4.5, 4.5, 1 / 3)]
    q, k, v = (torch.randn(batch, heads, length, size).requires_grad_() for _ in range(3))
    sides = {"sdpa causal": (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), upstream.transpose(1, 2))}
    for form, place in FORMS.items():
        for name in ("cpu", "blocked"):
            sides[f"{form} {name}"] = (
                lambda place=place, name=name: memory_read(
                    keys, keys, values, *bandwidths, **place, implementation=name
                ),
                upstream,
            )
    beta = bandwidths[0]
    sides["window block form"] = (lambda: rivals.window_read(keys, values, beta), upstream)
    times = {name: [] for name in sides}
    leaves = (q, k, v, keys, values, *bandwidths)
    for _ in range(repeats + 1):  # the first turn warms up
        for name, (run, grad) in sides.items():
            times[name].append(timed(run, grad, leaves))
    rows = {}
    for name, measured in times.items():
        forward, both = (statistics.median(f(t) for t in measured[1:]) for f in (lambda t: t[0], sum))
        rows[name] = {"forward_ms": forward * 1e3, "both_ms": both * 1e3}
        if name.endswith("cpu"):
            work = 2 * size * pairs_read(batch, length, heads, FORMS[name.split()[0]])
            rows[name]["gflops"] = 7 * work / both / 1e9
        inputs = 4 * (keys.numel() + values.numel())
        rows[name]["extra_memory_over_inputs"] = common.extra_memory(lambda s=sides[name]: timed(*s, leaves)) / inputs
    for form in FORMS:
        mine = rows[f"{form} cpu"]
        for rival in ("sdpa causal", f"{form} blocked", "window block form"):
            if rival.startswith("window") <= (form == "window"):
                series = ([sum(t) for t in times[name][1:]] for name in (rival, f"{form} cpu"))
                mine[f"faster_than_{rival.replace(' ', '_')}"] = common.ratio(*series).median
    return rows


def decoding(pairs: int, repeats: int) -> dict:
    """One query over `pairs` pairs of a larger store, both layouts, against SDPA and a plain read of as many bytes."""
    heads, size, capacity = 8, 64, pairs + pairs // 4
    bandwidths = [torch.full((heads,), x) for x in (4.5, 4.5, 1 / 3)]
    query = torch.randn(1, 1, heads, size)
    by_time = [torch.rand(1, capacity, heads, size)[:, :pairs] for _ in range(2)]
    by_head = [torch.rand(1, heads, capacity, size)[:, :, :pairs].transpose(1, 2) for _ in range(2)]
    plain = torch.rand(2 * pairs * heads * size)
    sides = {
        "time first": lambda: memory_read(query, *by_time, *bandwidths, offset=pairs),
        "heads first": lambda: memory_read(query, *by_head, *bandwidths, offset=pairs),
        "sdpa, heads first": lambda: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, *by_head))),
        "sum of as many floats": plain.sum,
    }
    loops = max(1, 20_000 // (pairs + 50))
    times = {name: [] for name in sides}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, run in sides.items():
                start = time.perf_counter()
                for _ in range(loops):
                    run()
                times[name].append((time.perf_counter() - start) / loops)
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    return {name: {"us": t * 1e6, "gb_s": plain.numel() * 4 / t / 1e9} for name, t in medians.items()}


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", default="4,4096,8,64", help="B,T,H,D")
    parser.add_argument("--decode", action="store_true", help="time single queries instead")
    options = parser.parse_args()
    torch.manual_seed(0)
    keep_pages()
    if options.decode:
        results = {str(n): decoding(n, options.rounds) for n in (1, 256, 2_048, 32_768)}
    else:
        shape = tuple(int(n) for n in options.shape.split(","))
        results = {options.shape: training(shape, options.rounds)}
    for group, rows in results.items():
        print(f"{group} ({torch.get_num_threads()} threads)")
        for name, row in rows.items():
            print(f"  {name:22}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    common.write(options.json, {"environment": common.environment(), "results": results})


if __name__ == "__main__":
    main()

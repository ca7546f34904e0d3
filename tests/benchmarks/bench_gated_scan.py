"""The gated scan and the elementwise operations beside PyTorch's own, B=4 H=8 T=4096 D=64, forward + backward.

python -m tests.benchmarks.bench_gated_scan [--json FILE] [--rounds N] [--leave-pages]

All contestants alternate in one run. Wall time is what a user waits; processor time (all threads together) stays
meaningful on a shared machine. --leave-pages leaves malloc as it comes, to see what `keep_pages` is worth.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels.allocator import keep_pages
from mmcore.kernels.gated_scan import gated_scan
from mmcore.kernels.look_ahead import look_ahead
from mmcore.kernels.rms_norm import rms_norm
from mmcore.kernels.swiglu import swiglu

B, T, H, D, WIDE = 4, 4096, 8, 64, 1536


def pass_both_ways(function: Callable[..., Tensor], *parts: Tensor) -> Callable[[], None]:
    """Forward and backward of `function`, with fresh gradients each time."""
    leaves = [part.clone().requires_grad_() for part in parts]
    upstream = torch.randn_like(function(*leaves))

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, upstream)

    return run


def contestants() -> dict[str, Callable[[], object]]:
    heads, gates, decays = torch.randn(B, T, H, D), torch.randn(B, T, H), -torch.rand(B, T, H)
    x, weight, mix, scale = torch.randn(B * T, H * D), torch.randn(H * D), torch.rand(H), torch.rand(H)
    wide, up, copy = torch.randn(B * T, WIDE), torch.randn(B * T, WIDE), torch.empty_like(heads)
    runs: dict[str, Callable[[], object]] = {"copy of the keys": lambda: copy.copy_(heads)}
    for form in ("cpu", "blocked"):
        runs[f"gated_scan {form}"] = pass_both_ways(
            lambda *p, form=form: gated_scan(*p, implementation=form)[0], heads, gates, decays
        )
        runs[f"look_ahead {form}"] = pass_both_ways(
            lambda *p, form=form: look_ahead(*p, implementation=form), heads, mix, scale
        )
    runs["rms_norm cpu"] = pass_both_ways(lambda a, w: rms_norm(a, w, 1e-5, "cpu"), x, weight)
    runs["rms_norm torch"] = pass_both_ways(lambda a, w: F.rms_norm(a, w.shape, w, 1e-5), x, weight)
    runs["swiglu cpu"] = pass_both_ways(lambda g, u: swiglu(g, u, "cpu"), wide, up)
    runs["swiglu torch"] = pass_both_ways(lambda g, u: F.silu(g) * u, wide, up)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--leave-pages", action="store_true")
    options = parser.parse_args()
    pages = "left to malloc" if options.leave_pages else keep_pages() or "kept"
    runs = contestants()
    walls: dict[str, list[float]] = {name: [] for name in runs}
    processors: dict[str, list[float]] = {name: [] for name in runs}
    faults = dict.fromkeys(runs, 0)
    for measured in [False] + [True] * options.rounds:
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            run()
            if measured:
                walls[name].append(1e3 * (time.perf_counter() - wall))
                processors[name].append(1e3 * (time.process_time() - processor))
                faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    results = {
        name: {
            "wall_ms_median": statistics.median(walls[name]),
            "wall_ms_least": min(walls[name]),
            "processor_ms_median": statistics.median(processors[name]),
            "page_faults": faults[name] // options.rounds,
        }
        for name in runs
    }
    base = results["copy of the keys"]["processor_ms_median"]
    print(f"{torch.get_num_threads()} threads, pages {pages}; ratio: processor time over that of the copy")
    for name, row in results.items():
        print(
            f"{name:18} wall {row['wall_ms_median']:8.1f} ms (least {row['wall_ms_least']:7.1f})"
            f"  processor {row['processor_ms_median']:7.1f} ms  ratio {row['processor_ms_median'] / base:6.1f}"
            f"  faults {row['page_faults']:6}"
        )
    if options.json:
        options.json.write_text(json.dumps({"pages": pages, "results": results}, indent=1))


if __name__ == "__main__":
    main()

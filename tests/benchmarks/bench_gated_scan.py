"""The gated scan and the elementwise operations beside PyTorch's own, B=4 H=8 T=4096 D=64, forward + backward.

The scan's rival is chunks as matrix products, compiled (rivals.py). All contestants alternate in one run. Wall time is what a user waits; processor time (all threads together) stays
meaningful on a shared machine. --leave-pages leaves malloc as it comes, to see what `keep_pages` is worth.
"""

import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels.allocator import keep_pages
from mmcore.kernels.gated_scan import gated_scan
from mmcore.kernels.look_ahead import look_ahead
from mmcore.kernels.rms_norm import rms_norm
from mmcore.kernels.swiglu import swiglu
from tests.benchmarks import common, rivals

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
    runs["gated_scan compiled chunks"] = pass_both_ways(rivals.chunked_scan, heads, gates, decays)
    runs["rms_norm cpu"] = pass_both_ways(lambda a, w: rms_norm(a, w, 1e-5, "cpu"), x, weight)
    runs["rms_norm torch"] = pass_both_ways(lambda a, w: F.rms_norm(a, w.shape, w, 1e-5), x, weight)
    runs["swiglu cpu"] = pass_both_ways(lambda g, u: swiglu(g, u, "cpu"), wide, up)
    runs["swiglu torch"] = pass_both_ways(lambda g, u: F.silu(g) * u, wide, up)
    return runs


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--leave-pages", action="store_true", help="leave malloc as it comes")
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
            "wall_ms": common.figure(walls[name]),
            "wall_ms_least": min(walls[name]),
            "processor_ms_median": statistics.median(processors[name]),
            "page_faults": faults[name] // options.rounds,
        }
        for name in runs
    }
    inputs = 4 * B * T * H * (D + 2)
    for name in runs:
        if name.startswith("gated_scan"):
            results[name]["extra_memory_over_inputs"] = common.extra_memory(runs[name]) / inputs
    ratios = {
        f"gated_scan {other} / gated_scan cpu": common.ratio(walls[f"gated_scan {other}"], walls["gated_scan cpu"])
        for other in ("compiled chunks", "blocked")
    }
    print(f"{torch.get_num_threads()} threads, pages {pages}")
    for name, row in results.items():
        memory = row.get("extra_memory_over_inputs")
        print(
            f"{name:26} wall {row['wall_ms']:8.1f} ms (least {row['wall_ms_least']:7.1f})"
            f"  processor {row['processor_ms_median']:7.1f} ms  faults {row['page_faults']:6}"
            + ("" if memory is None else f"  extra memory {memory:.2f} of the inputs'")
        )
    for name, value in ratios.items():
        print(f"{name:50} {value:.2f}")
    common.write(options.json, {"environment": common.environment(), "pages": pages, "results": results, "ratios": ratios})


if __name__ == "__main__":
    main()

"""How the time and the memory of a training step grow with the context: a mosaic, its transformer twin, and a plot.

One sequence a step, every model and context in a process of its own. The time is processor time, which a machine that
does other work leaves meaningful; the memory is the highest resident one. --draw-only draws a JSON again, or the last growth of
one layer that a GPU's visits have measured (results/h100.json).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import bench_training, common

LABELS = {"mm": "mosaic", "mm llama": "transformer twin", "hf": "Hugging Face Llama"}
GPU_SIDES = {"memory_mosaics_v2": "mm", "llama": "mm llama"}


class Grower(bench_training.Trainer):
    """A trainer whose steps are timed in processor seconds of all threads."""

    def cost(self) -> tuple[float, float]:
        """Processor seconds of a step after one that warms up, and the highest resident memory in MB."""
        if self.context <= 8192:  # a longer step is long enough to hide what the first one prepares
            self.step()
        start = time.process_time()
        self.step()
        return time.process_time() - start, self.memory()


def measure(arguments: Any) -> dict[str, Any]:
    shape = common.SHAPES[arguments.shape]
    report: dict[str, Any] = {"environment": common.environment(), "shape": shape, "growth": {}}
    for context in arguments.context:
        for name in arguments.sides:
            side = common.Side(Grower, name, shape, context, context, arguments.threads)
            seconds, megabytes = side.call("cost")
            side.close()
            report["growth"].setdefault(name, []).append([context, seconds, megabytes])
            print(f"{name:<10} context {context:6}: {1e6 * seconds / context:7.0f} us a token, {megabytes:6.0f} MB", flush=True)
            common.write(arguments.json, report)
    return report


def of_a_gpu(report: dict[str, Any]) -> dict[str, Any]:
    """What `draw` takes, of the last of a GPU's visits (gpu_visit, part g) that has a growth."""
    rows = [visit["parts"]["growth"]["rows"] for visit in report["visits"] if "growth" in visit["parts"]][-1]
    growth: dict[str, list] = {}
    for row in rows:
        growth.setdefault(GPU_SIDES[row["kind"]], []).append([row["context"], row["ms"] / 1e3, row["peak_gb"] * 1e3])
    return {"growth": growth, "time": ("a layer's time, us a token", 1e6), "memory": "highest memory with one layer, GB"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Time a token, and memory, over the context."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mm"
    from matplotlib import pyplot

    time_title, a_second = report.get("time", ("processor time, ms a token", 1e3))
    memory_title = report.get("memory", "highest memory, GB")
    figure, (time_axis, memory_axis) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, points in report["growth"].items():
        contexts = [point[0] for point in points]
        style = {"marker": "o", "markersize": 4, "label": LABELS.get(name, name)}
        time_axis.plot(contexts, [a_second * seconds / context for context, seconds, _ in points], **style)
        memory_axis.plot(contexts, [megabytes / 1e3 for *_, megabytes in points], **style)
    for axis, title in ((time_axis, time_title), (memory_axis, memory_title)):
        axis.set(xlabel="context, tokens", title=title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="S1")
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--sides", nargs="+", choices=list(LABELS), default=["mm", "mm llama"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it here")
    parser.add_argument("--draw-only", action="store_true", help="read the JSON instead of measuring")
    arguments = parser.parse_args()
    report = json.loads(arguments.json.read_text()) if arguments.draw_only else common.plain(measure(arguments))
    if arguments.plot:
        draw(of_a_gpu(report) if "visits" in report else report, arguments.plot)


if __name__ == "__main__":
    main()

"""One visit to a GPU: everything that only a card can answer, part by part, each with its own time.

`python -m tests.benchmarks.gpu_visit [--parts abcdefghi] [--out FOLDER]` on the card, from the project's root;
`python -m tests.benchmarks.gpu_visit --tiny --device cpu` tries every part on toy shapes, with Triton's interpreter.
What fails prints its traceback, and the rest goes on; the JSON, named after the device, is written after every part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
BUDGETS = {"a": 240, "b": 100, "c": 300, "d": 90, "e": 420, "f": 240, "g": 120, "h": 450, "i": 120}
"""Seconds of each part; a to g together are what a lease of half an hour leaves after starting machines."""


def tests(place: Any, report: dict[str, Any]) -> None:
    """Part a: the kernels' tests on the card, by many processes: most of the time goes to compiling."""
    command = [sys.executable, "-m", "pytest", "tests/kernels", "tests/model/test_graphed.py", "-k", "triton or on_a_gpu"]
    command += ["-q", "--tb=short", "-rf"]
    if place.tiny:
        command.append("--co")
    elif importlib.util.find_spec("xdist"):
        command += ["-n", "12"]
    with tempfile.TemporaryFile("w+") as log:
        try:
            report["exit"] = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
        finally:
            log.seek(0)
            text = log.read()
            print(text[-12_000:], flush=True)
            report["last"] = (text.strip().splitlines() or [""])[-1]


def parts() -> dict[str, tuple[str, Callable]]:
    from tests.benchmarks import gpu_kernels, gpu_models, gpu_scale

    return {
        "a": ("tests", tests),
        "b": ("gated_scan", gpu_kernels.scans),
        "c": ("memory_read", gpu_kernels.reads),
        "d": ("linear_cross_entropy", gpu_kernels.losses),
        "e": ("training", gpu_models.training),
        "f": ("decoding", gpu_models.decoding),
        "g": ("growth", gpu_kernels.growth),
        "h": ("precisions", gpu_scale.precisions),
        "i": ("planned memory", gpu_scale.memory),
    }


class TimeIsUp(BaseException):
    """A part has used its seconds. No Exception, so that nothing within the part takes it for a fault of its own."""


def _time_is_up(signum: int, frame: FrameType | None) -> None:
    raise TimeIsUp


def run(names: str, place: Any, file: Path, report: dict[str, Any]) -> None:
    """Run the parts one after the other, each within its seconds, and write the report after each."""
    import traceback

    signal.signal(signal.SIGALRM, _time_is_up)
    for name in names:
        title, work = parts()[name]
        budget = BUDGETS[name] * (5 if place.tiny else 1)  # the interpreter takes a tenth of a second a launch
        print(f"== {name}: {title} (at most {budget} s)", flush=True)
        found = report["parts"].setdefault(title, {})
        start = time.perf_counter()
        try:
            signal.alarm(budget)
            work(place, found)
        except TimeIsUp:
            print(f"   {title} has used its {budget} s", flush=True)
            found["cut_short"] = True
        except Exception:  # noqa: BLE001  the other parts are worth having
            traceback.print_exc()
            found["error"] = traceback.format_exc(limit=3)
        finally:
            signal.alarm(0)
        found["seconds"] = round(time.perf_counter() - start, 1)
        file.write_text(json.dumps(report, indent=1, default=str) + "\n")
        place.free()
    print(f"written to {file}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="abcdefghi", help="letters of the parts, in the order to run them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, to see that nothing is broken")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder of the report")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

    import torch

    from tests.benchmarks.common import environment
    from tests.benchmarks.gpu_timing import Place

    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    place = Place(device, options.tiny)
    report: dict[str, Any] = {"environment": environment() | {"device": name}, "tiny": options.tiny, "parts": {}}
    try:
        import triton

        report["environment"]["versions"]["triton"] = triton.__version__
    except ImportError:
        print("triton is not installed", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    run(options.parts, place, options.out / f"visit-{slug}-{options.parts}.json", report)


if __name__ == "__main__":
    main()

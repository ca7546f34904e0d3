"""One visit to a GPU: everything that only a card can answer, part by part, each with its own time.

`python -m tests.benchmarks.gpu_visit [--parts bvcdefghijlsrqktu] [--out FOLDER]` on the card, from the project's root;
`python -m tests.benchmarks.gpu_visit --tiny --device cpu` tries every part on toy shapes, with Triton's interpreter.
What fails prints its traceback, and the rest goes on; the JSON, named after the device, is written after every part.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any


def parts() -> dict[str, tuple[str, int, Callable]]:
    """By letter: what it is called, its seconds at most, what does it."""
    from tests.benchmarks import gpu_kernels, gpu_models, gpu_scale, gpu_sweep

    return {
        "b": ("gated_scan", 100, gpu_kernels.scans),
        "v": ("small kernels", 30, gpu_kernels.small_ones),
        "c": ("memory_read", 300, gpu_kernels.reads),
        "d": ("linear_cross_entropy", 90, gpu_kernels.losses),
        "e": ("training", 420, gpu_models.training),
        "j": ("training of smaller models", 200, gpu_models.smaller_training),
        "u": ("training by torchtitan", 160, gpu_models.titan_training),
        "f": ("decoding", 240, gpu_models.decoding),
        "g": ("growth", 120, gpu_kernels.growth),
        "h": ("precisions", 450, gpu_scale.precisions),
        "i": ("planned memory", 120, gpu_scale.memory),
        "l": ("rivals of gated_scan", 120, gpu_kernels.scan_rivals),
        "s": ("configurations of gated_scan", 60, gpu_sweep.scan),
        "k": ("products of a decoding step", 120, gpu_sweep.step),
        "t": ("shares of a decoding step", 60, gpu_sweep.shares),
        "r": ("configurations of memory_read forward", 60, gpu_sweep.read_forward),
        "q": ("configurations of memory_read backward", 150, gpu_sweep.read_backward),
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
        title, budget, work = parts()[name]
        budget *= 5 if place.tiny else 1  # the interpreter takes a tenth of a second a launch
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
            print(f"   {title}: error", flush=True)
            found["error"] = traceback.format_exc(limit=3)
        finally:
            signal.alarm(0)
        found["seconds"] = round(time.perf_counter() - start, 1)
        file.write_text(json.dumps(report, indent=1, default=str) + "\n")
        place.free()
    print(f"written to {file}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="bvcdefghijlsrqktu", help="letters of the parts, in the order to run them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warm", action="store_true", help="all once and untimed, to fill the compilers' caches")
    parser.add_argument("--share", default="0/1", help="which of how many processes this is: sweeps are shared out")
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
    share = tuple(int(word) for word in options.share.split("/"))
    place = Place(device, options.tiny, options.warm, share)
    report: dict[str, Any] = {"environment": environment() | {"device": name}, "tiny": options.tiny, "parts": {}}
    try:
        import triton

        report["environment"]["versions"]["triton"] = triton.__version__
    except ImportError:
        print("triton is not installed", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    mark = f"-warm{share[0]}" if options.warm else ""
    run(options.parts, place, options.out / f"visit-{slug}-{options.parts}{mark}.json", report)


if __name__ == "__main__":
    main()

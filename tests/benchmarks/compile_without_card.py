"""What torch.compile makes in a visit's parts, compiled before the visit, without a card, into the compilers' caches.

`python -m tests.benchmarks.compile_without_card --parts e [--name "NVIDIA H100 80GB HBM3"]` with the card's versions of Python,
torch and Triton, and TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR at the paths they will have there. The parts run once in a
process that sees a stand-in for CUDA (tests/helpers/stand_in.py): nothing they measure means anything.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", required=True, help="letters of gpu_visit's parts")
    parser.add_argument("--name", default="NVIDIA H100 80GB HBM3", help="the card's, which the caches' keys hold")
    parser.add_argument("--child", action="store_true", help="used within")
    options = parser.parse_args()
    from tests.helpers import stand_in

    if options.child:
        from tests.benchmarks import gpu_visit

        stand_in.install()
        sys.argv[1:] = ["--warm", "--parts", options.parts, "--out", tempfile.mkdtemp()]
        gpu_visit.main()
        print("finished", flush=True)
        os._exit(0)  # the compiler's helpers wait for a card's driver at the end
    with tempfile.TemporaryDirectory() as folder:
        environment = stand_in.environment(Path(folder)) | {"STAND_IN_NAME": options.name, "MM_AUTOTUNE": "0"}
        command = [sys.executable, "-m", "tests.benchmarks.compile_without_card", "--child", "--parts", options.parts]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            missed = False
            for line in process.stdout:
                print(line, end="", flush=True)
                missed |= ": error" in line
        if process.returncode or missed:
            sys.exit("not everything was compiled: see above")


if __name__ == "__main__":
    main()

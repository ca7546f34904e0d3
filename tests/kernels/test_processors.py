"""The compiled kernels as other processors and other compilers would have them, in processes of their own: this one's
instructions taken away, and each C compiler that is installed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmcore.kernels import native
from tests.helpers.compilers import instructions, wrapped

CHECKS = ["tests/kernels/test_thin_linear.py", "tests/kernels/test_linear.py", "tests/model/test_decoding.py",
          "tests/model/test_v1.py", "tests/kernels/test_memory_read.py::test_pairs_in_fp16_are_widened"]
ABOUT = "narrow or every_number or nan or overflow or rounding or compiled_step or in_fp16 or stay_close"
NO_OTHER = pytest.mark.skip(reason="no other C compiler is installed")
TAKEN_AWAY = {
    "AVX-512 without a matrix unit": ["-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8"],
    "AVX-512 without products of 16 bits": ["-mno-avx512vnni", "-mno-avx512bf16"],
    "AVX2": ["-mno-avx512f"],
    "AVX2 without products of 16 bits": ["-mno-avx512f", "-mno-avxvnni"],
    "AVX": ["-mno-avx2"],
    "vectors of four numbers": ["-mno-avx"],
}


def compilers():
    """Others than the one that is taken unasked: gcc-11, clang-14."""
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep)
               if os.path.isdir(folder) and os.access(folder, os.R_OK | os.X_OK)]
    names = {name for folder in folders for name in os.listdir(folder) if re.fullmatch(r"(gcc|clang)-\d+", name)}
    found = {name: os.path.realpath(shutil.which(name)) for name in names if shutil.which(name)}
    mine = native.compiler() and os.path.realpath(shutil.which(native.compiler()))
    return sorted(name for name, place in found.items() if place != mine) or [pytest.param(None, marks=NO_OTHER)]


def check(compiler, cache):
    """The kernels' tests of numbers on what `compiler` builds."""
    env = {**os.environ, "CC": str(compiler), "MM_CACHE": str(cache)}
    code = "from mmcore.kernels import native; print(native.why_not() or '')"
    reason = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.strip()
    if re.search(r"fopenmp|omp\.h|-lomp|-lgomp|libg?omp", reason.partition("probe.c: ")[2] or reason.partition("loaded: ")[2]):
        pytest.skip(reason)
    assert not reason, reason
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", *CHECKS, "-k", ABOUT],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900, env=env,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert len(list((cache / "kernels").glob("*.so"))) >= 4


@pytest.mark.slow
@pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
@pytest.mark.parametrize("processor", TAKEN_AWAY)
def test_kernels_of_other_processors(processor, tmp_path):
    found, names = instructions(TAKEN_AWAY[processor]), list(TAKEN_AWAY)
    if found is None:
        pytest.skip(f"the compiler does not know {TAKEN_AWAY[processor]}")
    others = [[], *(TAKEN_AWAY[name] for name in names[: names.index(processor)])]
    if any(found == instructions(flags) for flags in others):
        pytest.skip("this processor has nothing that the flags take away and others do not")
    compiler = wrapped(tmp_path / "cc", flags=" ".join(TAKEN_AWAY[processor]))
    check(compiler, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", compilers())
@pytest.mark.parametrize("flags", ["", "-mno-avx"])
def test_kernels_of_other_compilers(compiler, flags, tmp_path):
    if flags and instructions([flags], compiler) is None:
        pytest.skip(f"{compiler} does not know {flags}")
    check(wrapped(tmp_path / "cc", compiler, flags), tmp_path / "cache")

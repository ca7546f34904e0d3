"""Declaring the functions of a C file."""

import ctypes
import os
import subprocess
import sys

import pytest

from mmcore.errors import HardwareError
from mmcore.kernels import native
from tests.helpers.forms import needs_compiler


@needs_compiler
def test_functions_are_built_at_the_first_call_with_their_types(tmp_path, monkeypatch):
    monkeypatch.setenv("MM_CACHE", str(tmp_path))
    source = tmp_path / "add.c"
    source.write_text("double half(long n) { return n / 2.0; }\nvoid put(int *where) { *where = 7; }\n")
    found = native.functions(source, half=(ctypes.c_double, [ctypes.c_long]), put=[ctypes.c_void_p])
    assert not list(tmp_path.glob("kernels/*.so")), "built before it was needed"
    number = ctypes.c_int(0)
    found.put(ctypes.byref(number))
    assert number.value == 7 and found.half(5) == 2.5
    with pytest.raises(AttributeError, match="add.c declares no function other"):
        found.other(1)


@needs_compiler
def test_a_source_that_does_not_compile_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("MM_CACHE", str(tmp_path))
    source = tmp_path / "broken.c"
    source.write_text("int broken(\n")
    with pytest.raises(HardwareError, match="could not build broken.c"):
        native.functions(source, broken=[]).broken()


def test_a_compiler_that_is_here_builds_the_kernels():
    """Or all their tests would be left out in silence."""
    assert native.compiler() is None or native.why_not() is None, native.why_not()


REFUSING = """#!/bin/sh
case "$*" in *-fopenmp*) echo "error: unsupported option '-fopenmp'" >&2; exit 1;; esac
exec cc "$@"
"""


@needs_compiler
@pytest.mark.slow
def test_a_compiler_without_openmp_is_done_without_and_said(tmp_path):
    """As on a Mac: the commands go on with PyTorch's forms, and the user hears of it."""
    compiler = tmp_path / "cc"
    compiler.write_text(REFUSING)
    compiler.chmod(0o755)
    code = (
        "import torch\n"
        "from mmcore.kernels import native\n"
        "from mmcore.kernels.linear import linear\n"
        "x, w = torch.randn(70, 33), torch.randn(21, 33)\n"
        "torch.testing.assert_close(linear(x, [w])[0], x @ w.T)\n"
        "print(native.notice())\n"
    )
    env = {**os.environ, "CC": str(compiler), "MM_CACHE": str(tmp_path / "cache")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "unsupported option '-fopenmp'" in found.stdout and "install gcc, or set CC" in found.stdout
    assert not list((tmp_path / "cache").glob("kernels/*.so"))

"""Declaring the functions of a C file."""

import ctypes
import os
import pwd
import shutil
import subprocess
import sys

import pytest

from mmcore.errors import HardwareError
from mmcore.kernels import dispatch, native
from tests.helpers.compilers import instructions, wrapped
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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' compilers may have no OpenMP")
def test_a_compiler_that_is_here_builds_the_kernels():
    """Or all their tests would be left out in silence."""
    assert native.compiler() is None or native.why_not() is None, native.why_not()


def report(compiler, cache, code):
    env = {**os.environ, "CC": str(compiler), "MM_CACHE": str(cache)}
    env.pop("MM_KERNELS", None)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


LINEAR = """
import torch
from mmcore.kernels import dispatch
from mmcore.kernels.linear import linear
x, w = torch.randn(70, 33), torch.randn(21, 33)
torch.testing.assert_close(linear(x, [w])[0], x @ w.T)
print(dispatch.notice())
"""


@needs_compiler
@pytest.mark.slow
def test_a_compiler_without_openmp_is_done_without_and_said(tmp_path):
    """As on a Mac: PyTorch's forms do the work, and the reason can be told."""
    refuses = """case "$*" in *-fopenmp*) echo "error: unsupported option '-fopenmp'" >&2; exit 1;; esac"""
    said = report(wrapped(tmp_path / "cc", first=refuses), tmp_path / "cache", LINEAR)
    assert "unsupported option '-fopenmp'" in said and "install gcc, or set CC" in said
    assert not list((tmp_path / "cache").glob("kernels/*.so"))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mnemonic", ["{vex} vpdpwssd", "tileloadd"])
def test_an_assembler_that_is_older_than_its_compiler(mnemonic, tmp_path):
    """RHEL 9: gcc 11 writes instructions that binutils 2.35 does not know. The kernels are built without them."""
    macros = instructions()
    if "__clang__" in macros or shutil.which("as") is None or ("tile" in mnemonic and "__AMX_TILE__" not in macros):
        pytest.skip("no assembler of its own, or this processor has no matrix unit")
    newer = "-mavxvnni -mno-avx512f" if "vex" in mnemonic else ""
    assembler = tmp_path / "as"
    assembler.write_text("#!/bin/sh\nfor file; do case $file in *.s) if grep -q '" + mnemonic + "' $file; then "
                         "echo 'Error: no such instruction' >&2; exit 1; fi;; esac; done\nexec " + shutil.which("as") + " \"$@\"\n")
    assembler.chmod(0o755)
    refuses = f'set -- "$@" -B{tmp_path} $(case "$*" in *-mno-avxvnni*) ;; *) echo {newer};; esac)'
    compiler = wrapped(tmp_path / "cc", first=refuses)
    if newer and instructions(["-mavxvnni"]) is None:
        pytest.skip("the compiler does not know AVX-VNNI")
    said = report(compiler, tmp_path / "cache", LINEAR + "from mmcore.kernels import native\nprint(native._extra_flags())")
    assert said.splitlines() == ["None", str(tuple(native.OLD_ASSEMBLER))]
    assert list((tmp_path / "cache").glob("kernels/linear-cpu-*.so"))


@pytest.fixture
def why_not(monkeypatch):
    """Asked anew: what this process has found is remembered."""
    for name in ("_extra_flags", "_load"):
        monkeypatch.setattr(native, name, getattr(native, name).__wrapped__)
    return native.why_not.__wrapped__


@needs_compiler
@pytest.mark.parametrize("home", [True, False])
def test_without_a_folder_to_build_in_the_reason_names_the_way_out(home, why_not, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "file") if home else "")
    if not home:  # a user without an entry, as in a container
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert "set MM_CACHE to one of your own" in why_not()


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written(why_not, monkeypatch, tmp_path):
    (tmp_path / "kernels").mkdir(mode=0o500)
    monkeypatch.setenv("MM_CACHE", str(tmp_path))
    assert "cannot be written: set MM_CACHE" in why_not()


@pytest.mark.parametrize("forced", ["blocked", "reference", "cpu"])
def test_who_has_chosen_a_form_hears_no_notice(forced, monkeypatch):
    monkeypatch.setattr(dispatch, "_NO_COMPILER", "there is none")
    monkeypatch.setattr(dispatch, "_FORCED", "auto")
    assert "there is none" in dispatch.notice()
    monkeypatch.setattr(dispatch, "_FORCED", forced)
    assert dispatch.notice() is None


@needs_compiler
@pytest.mark.slow
def test_nothing_is_compiled_where_another_form_is_asked_for(tmp_path):
    """By the whole step of decoding neither."""
    code = (
        "import torch, mmcore\n"
        "from mmcore.kernels.linear.cpu import multiplies_bf16\n"
        "from tests.helpers.models import tiny\n"
        "list(mmcore.generate(tiny(), [1, 2, 3], max_new_tokens=3, stop_ids=()))\n"
        "assert not multiplies_bf16()\n"
    )
    env = {**os.environ, "MM_KERNELS": "blocked", "MM_CACHE": str(tmp_path / "cache")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert found.returncode == 0, found.stderr[-2000:]
    assert not list(tmp_path.glob("cache/kernels/*"))

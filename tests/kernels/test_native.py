"""Declaring the functions of a C file."""

import ctypes

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

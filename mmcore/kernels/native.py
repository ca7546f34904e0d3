"""C kernels for the CPU, compiled on first use with the system's compiler.

Plain C behind ctypes, not a C++ extension: 1-2 s to build instead of 30-40, no Python headers, no ninja. The
library is cached under $MM_CACHE (default ~/.cache/mm) by the hash of its source, compiler and processor, so
a cache shared between unlike machines never runs the wrong instructions. A machine without a C compiler, or with
one that cannot build them, uses the PyTorch forms: dispatch asks `why_not`, says so where the C form was asked for
by name, and the commands say so once (`dispatch.notice`).

Built by gcc they link libgomp by soname and so share the thread pool that torch has loaded: two pools on the same
cores would spin against each other, as those of clang's libomp do, so gcc is taken where there is one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from mmcore.config.words import cache_root
from mmcore.errors import HardwareError

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-std=gnu11"]


OLD_ASSEMBLER = ["-mno-avxvnni", "-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]
"""For a compiler that knows newer instructions than its assembler, as RHEL 9's gcc 11 with binutils 2.35."""


class BuildError(HardwareError):
    """What the compiler or the loader says of a C file."""


def compiler() -> str | None:
    """The C compiler to use: $CC, else gcc, cc or clang, else None. gcc first: its OpenMP is what torch has loaded."""
    for name in (os.environ.get("CC"), "gcc", "cc", "clang"):
        if name and shutil.which(name):
            return name
    return None


@functools.cache
def why_not() -> str | None:
    """The reason why no C kernel can be built and loaded here, or None: a small file that asks for the same is tried."""
    if os.name != "posix":
        return "compiled kernels need a POSIX system"
    if compiler() is None:
        return "there is no C compiler (install gcc, or set CC)"
    try:
        _extra_flags()
    except BuildError as error:
        return f"{error} (install gcc, or set CC)"
    except (HardwareError, OSError) as error:
        return str(error)
    return None


@functools.cache
def _extra_flags() -> tuple[str, ...]:
    """What is to be added to FLAGS so that the probe can be built. Raises BuildError where nothing helps."""
    probe, first = Path(__file__).with_name("probe.c"), None
    for extra in ((), tuple(OLD_ASSEMBLER)):
        try:
            if _load(probe, extra).mm_probe(1) != 1:
                raise BuildError(f"what {compiler()} builds does not compute rightly")
            return extra
        except BuildError as error:
            first = first or error
    raise first


def cache_folder() -> Path:
    """The folder of built libraries, made for this user alone: what lies in it is run. Raises HardwareError."""
    try:
        root = cache_root(HardwareError) / "kernels"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = root.stat().st_uid
    except OSError as error:
        raise HardwareError(f"compiled kernels have no folder ({error}): set MM_CACHE to one of your own") from None
    if owner != os.getuid():
        raise HardwareError(f"{root} belongs to another user: set MM_CACHE to a folder of your own")
    return root


@functools.cache
def _processor() -> str:
    """What -march=native depends on, as text."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()


def load(source: Path) -> ctypes.CDLL:
    """Build (once per machine and source) and load the C file `source`.

    Raises HardwareError, with the compiler's first error, where it does not compile.
    """
    reason = why_not()
    if reason:
        raise HardwareError(f"cannot build {source.name}: {reason}")
    try:
        return _load(source, _extra_flags())
    except BuildError as error:
        raise BuildError(f"{error}; MM_KERNELS=blocked does without it") from None


@functools.cache
def _load(source: Path, extra: tuple[str, ...]) -> ctypes.CDLL:
    cc, flags = compiler(), [*FLAGS, *extra]
    headers = "".join(sorted(p.read_text() for p in Path(__file__).parent.glob("*.h")))
    text = source.read_text() + headers
    version = subprocess.run([cc, "--version"], capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([text, version, _processor(), *flags]).encode()).hexdigest()[:24]
    library = cache_folder() / f"{source.parent.name}-{source.stem}-{key}.so"
    if not library.exists():
        _build([cc, *flags], source, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:  # no OpenMP runtime, a file system that nothing may be run from
        raise BuildError(f"{library} cannot be loaded: {error}") from None


class functions:
    """The functions of a C file, declared; built and loaded when the first of them is called.

    `functions(Path("cpu.c"), add=[c_void_p, c_int])` has the attribute `add`. A signature is the list of argument types
    of a function that returns nothing, or a tuple of the result's type and that list.
    """

    def __init__(self, source: Path, **signatures: list | tuple[type, list]) -> None:
        self._source, self._signatures = source, signatures

    def __getattr__(self, name: str) -> Callable:  # called for what is not yet there
        if name.startswith("_") or name not in self._signatures:
            raise AttributeError(f"{self._source.name} declares no function {name}")
        library = load(self._source)
        for each, signature in self._signatures.items():
            function = getattr(library, each)
            function.restype, function.argtypes = signature if isinstance(signature, tuple) else (None, signature)
            setattr(self, each, function)
        return self.__dict__[name]


def _build(compile_: list[str], source: Path, library: Path) -> None:
    if not os.access(library.parent, os.W_OK):
        raise HardwareError(f"{library.parent} cannot be written: set MM_CACHE to a folder of your own")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [*compile_, f"-I{Path(__file__).parent}", "-o", str(built), str(source), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            # after it come the source and a caret; the compiler writes "error", the assembler "Error"
            first = next((line for line in lines if "error" in line.lower()), lines[-1])
            raise BuildError(f"{compile_[0]} could not build {source.name}: {first}")
        os.replace(built, library)  # atomic: two processes that build at once leave one whole library


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's data for a C function; None becomes NULL."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())

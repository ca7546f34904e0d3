"""The implementations that kernel tests go through, and what each needs."""

import importlib.util
from importlib import metadata

import pytest
import torch

from mmcore.kernels import native

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
"""Where Triton kernels run: a GPU, or the CPU in Triton's interpreter (slow: some 0.1 s a launch)."""

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=f"no C kernels: {native.why_not()}")


def _no_triton() -> str | None:
    """Why Triton's kernels cannot be tested here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    triton, numpy = (tuple(int(n) for n in metadata.version(name).split(".")[:2]) for name in ("triton", "numpy"))
    if not ON_GPU and triton < (3, 9) and numpy >= (2, 4):  # arrays of one number are no numbers for numpy any more
        return "Triton's interpreter before 3.9 needs an older numpy: pip install 'numpy<2.4'"
    return None


needs_triton = pytest.mark.skipif(_no_triton() is not None, reason=f"{_no_triton()}")

CPU = pytest.param("cpu", marks=needs_compiler)
TRITON = pytest.param("triton", marks=needs_triton)

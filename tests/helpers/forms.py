"""The implementations that kernel tests go through, and what each needs."""

import importlib.util

import pytest
import torch

from mmcore.kernels import native

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
"""Where Triton kernels run: a GPU, or the CPU in Triton's interpreter (slow: some 0.1 s a launch)."""

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=f"no C kernels: {native.why_not()}")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CPU = pytest.param("cpu", marks=needs_compiler)
TRITON = pytest.param("triton", marks=needs_triton)

"""Triton compiles for an H100 and launches nothing: on a machine without a card, imported before a kernel is.

What is compiled so is kept under the very names that a card's own Triton looks for, if Python, Triton and its ptxas are of the
same versions and the cache lies at the same path (TRITON_CACHE_DIR). As a pytest plugin (`-p tests.helpers.no_card`) it
goes through the tests in Triton, whose results are then no numbers: run it with PYTHONOPTIMIZE=1 and --assert=plain.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mmcore.kernels import dispatch, tuning
from tests.helpers import forms


class _Utilities:
    def load_binary(self, name, binary, shared, device):
        return None, None, 32, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65_536}


class _NoLauncher:
    def __init__(self, source, metadata) -> None:
        pass

    def __call__(self, *_) -> None:
        pass


class NoCard:
    """A driver as Triton asks one."""

    utils = _Utilities()
    launcher_cls = _NoLauncher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_device_capability(self, device=0):
        return 9, 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        def once(call, quantiles=None, **_):
            call()
            return [1.0, 1.0, 1.0]

        return once


driver.set_active(NoCard())
tuning.processors = lambda x: 132
dispatch._INTERPRETED = True  # tensors on the CPU may go where a GPU's go
forms.ON_GPU = True
torch.testing.assert_close = lambda *_, **__: None

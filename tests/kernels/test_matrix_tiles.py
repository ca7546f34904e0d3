"""The matrix unit (AMX): beside the library, which uses it too, and refused by the system."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from mmcore.kernels.linear import cpu
from mmcore.kernels.thin_linear import thin_linear
from tests.helpers.forms import needs_compiler

has_tiles = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no matrix unit")


@has_tiles
@needs_compiler
def test_the_library_and_ours_take_turns():
    """Each configures a thread's tiles for itself: neither may find the other's."""
    if not cpu.multiplies_bf16():
        pytest.skip("the compiler does not know the matrix unit")
    x, weight = torch.randn(70, 96), torch.randn(50, 96)
    half, few = weight.bfloat16(), torch.randn(5, 96)
    once = None
    for _ in range(3):
        found = [F.linear(x.bfloat16(), half), *cpu.products(x, [weight], rounded=True), thin_linear(few, half),
                 F.linear(x[:33].bfloat16(), half[:17])]  # fmt: skip
        once = once or found
        assert all(torch.equal(a, b) for a, b in zip(found, once, strict=True))
    exact = x.bfloat16().double() @ half.double().T
    assert (once[1].double() - exact).abs().max() < 1e-4 and (once[0].double() - exact).abs().max() < 0.5


REFUSE = r"""
import ctypes, struct, sys
# seccomp: arch_prctl(ARCH_REQ_XCOMP_PERM) fails as on a kernel that does not know it
def op(code, jt, jf, k): return struct.pack("HBBI", code, jt, jf, k)
program = b"".join([op(0x20, 0, 0, 0), op(0x15, 0, 3, 158), op(0x20, 0, 0, 16), op(0x15, 0, 1, 0x1023),
                    op(0x06, 0, 0, 0x50000 | 22), op(0x06, 0, 0, 0x7FFF0000)])
class Fprog(ctypes.Structure): _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
if libc.prctl(22, 2, ctypes.byref(Fprog(6, program))) != 0: sys.exit(77)
import torch
from mmcore.kernels.linear import cpu
from mmcore.kernels.thin_linear import thin_linear
x, weight = torch.randn(70, 96), torch.randn(50, 96)
half = weight.bfloat16()
(y,) = cpu.products(x, [half])
exact = x.bfloat16().double() @ half.double().T
assert (y.double() - exact).abs().max() < 1e-4 and (thin_linear(x[:8], half).double() - exact[:8]).abs().max() < 1e-4
whole = torch.randint(-127, 128, (50, 96), dtype=torch.int8)
(z,) = cpu.products(x, [whole], [torch.ones(50)])
assert (z.double() - x.double() @ whole.double().T).abs().max() < 0.3
print("bf16" if cpu.multiplies_bf16() else "fp32")
"""


@has_tiles
@needs_compiler
@pytest.mark.slow
def test_a_system_that_refuses_the_unit_is_done_without():
    """The same library then takes vectors; and Intel's multiply bf16 slower than fp32, so that nothing is rounded."""
    found = subprocess.run([sys.executable, "-c", REFUSE], capture_output=True, text=True, timeout=300)
    if found.returncode == 77:
        pytest.skip("system calls cannot be filtered here")
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split()[-1] == "fp32"

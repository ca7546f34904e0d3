"""The truth is the definition, number by number, in Python's float64."""

import math

import pytest
import torch

from mmcore.errors import ConfigError
from mmcore.kernels.swiglu import swiglu
from tests.helpers.forms import DEVICE, needs_triton
from tests.helpers.poison import poisoned_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_form = pytest.mark.parametrize("form", ["reference", "blocked", "cpu"])


def truth(gate, up, upstream):
    """Output and both gradients, each number by itself."""
    rows = []
    for g, u, d in zip(gate.flatten().tolist(), up.flatten().tolist(), upstream.flatten().tolist(), strict=True):
        s = 1 / (1 + math.exp(-g)) if g > -700 else 0.0
        rows.append((g * s * u, d * u * (s + g * s * (1 - s)), d * g * s))
    return torch.tensor(rows, dtype=torch.float64).T.reshape(3, *gate.shape)


def check(form, gate, up, tolerance=2e-6):
    upstream = torch.randn(gate.shape, generator=torch.Generator().manual_seed(9)).to(gate.dtype)
    device = DEVICE if form == "triton" else "cpu"
    leaves = [x.detach().to(device).requires_grad_() for x in (gate, up)]
    got = swiglu(*leaves, form)
    assert got.dtype == gate.dtype
    got_all = [x.cpu() for x in (got.detach(), *torch.autograd.grad(got, leaves, upstream.to(device)))]
    for a, b in zip(got_all, truth(gate, up, upstream), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@every_form
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 5), (63, 64), (1, 65, 33), (3, 130, 96), (1,)])
def test_output_and_gradients(form, shape):
    check(form, 3 * torch.randn(shape), torch.randn(shape))


@every_form
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-12)])
def test_dtypes(form, dtype, tolerance):
    gate, up = torch.randn(4, 7, 48, dtype=dtype), torch.randn(4, 7, 48, dtype=dtype)
    if form == "cpu" and dtype == torch.float64:
        with pytest.raises(ConfigError, match="fp32"):
            swiglu(gate, up, form)
        return
    check(form, gate, up, tolerance)


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 1100])
def test_bf16_on_a_cpu_is_the_result_in_fp32_rounded(size):
    wide = torch.randn(3, 5, 2 * size).bfloat16()
    halves = [part.detach().requires_grad_() for part in (3 * wide[..., :size], wide[..., size:])]
    floats = [part.detach().float().requires_grad_() for part in halves]
    up = torch.randn(3, 5, size).bfloat16()
    got, wanted = swiglu(*halves, "cpu"), swiglu(*floats, "cpu")
    assert torch.equal(got, wanted.bfloat16())
    for a, b in zip(torch.autograd.grad(got, halves, up), torch.autograd.grad(wanted, floats, up.float()), strict=True):
        assert torch.equal(a, b.bfloat16())


@every_form
def test_every_size_of_gate(form):
    gate = torch.cat([torch.linspace(-120, 120, 4801), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])])
    check(form, gate, torch.ones_like(gate))
    at_infinity = swiglu(torch.tensor([math.inf, math.nan]), torch.ones(2), form)
    assert at_infinity[0] == math.inf and at_infinity[1].isnan()


@every_form
def test_halves_of_one_projection_and_other_strides(form):
    wide = torch.randn(3, 50, 80)
    gate, up = wide.chunk(2, dim=-1)
    check(form, gate, up)
    check(form, gate[:, ::3], up[:, ::3])
    check(form, gate.transpose(0, 1), up.transpose(0, 1))
    check(form, gate.transpose(1, 2), up.transpose(1, 2))
    check(form, gate, up.contiguous())


@every_form
def test_expanded_upstream_gradients_and_no_rows(form):
    gate, up = torch.randn(6, 16, requires_grad=True), torch.randn(6, 16)
    swiglu(gate, up, form).sum().backward()
    torch.testing.assert_close(gate.grad.double(), truth(gate, up, torch.ones(6, 16))[1], rtol=1e-5, atol=1e-6)
    assert swiglu(gate[:0], up[:0], form).shape == (0, 16)


@pytest.mark.parametrize("form", ["reference", "blocked"])
def test_gradcheck(form):
    parts = [torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.autograd.gradcheck(lambda *p: swiglu(*p, form), parts)


def test_fp64_runs_by_itself_and_bad_input_is_named():
    assert swiglu(torch.randn(2, 4).double(), torch.randn(2, 4).double()).dtype == torch.float64
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(torch.randn(2, 4), torch.randn(2, 3))
    with pytest.raises(ValueError, match="one shape and dtype"):
        swiglu(torch.randn(2, 4), torch.randn(2, 4).double())


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 5), (7, 130)])
def test_triton_output_and_gradients(shape):
    check("triton", 3 * torch.randn(shape), torch.randn(shape))


@needs_triton
def test_triton_halves_of_one_projection_and_fp16():
    fused = torch.randn(4, 3, 40)
    check("triton", fused[..., :20], fused[..., 20:])
    check("triton", torch.randn(3, 30).half(), torch.randn(3, 30).half(), tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@needs_triton
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_triton_on_a_card(dtype, tolerance):
    for shape in ((300, 100), (70_000, 3)):  # more rows than a grid takes at once
        check("triton", torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), tolerance)

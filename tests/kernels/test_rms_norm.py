"""The truth is a float64 loop over rows from the definition."""

import pytest
import torch

from mmcore.errors import ConfigError
from mmcore.kernels.rms_norm import rms_norm
from tests.helpers.forms import DEVICE, needs_triton
from tests.helpers.poison import poisoned_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_form = pytest.mark.parametrize("form", ["reference", "blocked", "cpu"])
EPS = 1e-5


def truth(x, weight, eps=EPS):
    rows = [row * weight / ((row * row).sum() / len(row) + eps).sqrt() for row in x.flatten(0, -2)]
    return torch.stack(rows).view(x.shape)


def gradients(function, parts, upstream):
    leaves = [part.detach().requires_grad_() for part in parts]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, upstream.to(y.dtype))


def check(form, x, weight, tolerance=1e-5):
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).to(x.dtype)
    want, want_gradients = gradients(truth, (x.double(), weight.double()), upstream)
    device = DEVICE if form == "triton" else "cpu"
    got, got_gradients = gradients(
        lambda *p: rms_norm(*p, EPS, form), (x.to(device), weight.to(device)), upstream.to(device)
    )
    got, got_gradients = got.cpu(), [gradient.cpu() for gradient in got_gradients]
    assert got.dtype == torch.promote_types(x.dtype, weight.dtype)
    torch.testing.assert_close(got.double(), want, rtol=2 * tolerance, atol=tolerance)
    for name, a, b in zip(("x", "weight"), got_gradients, want_gradients, strict=True):
        error, size = (a.double() - b).abs().max().item(), max(b.abs().max().item(), 0.1)
        assert error <= 5 * tolerance * size, f"{name}: {error:.2e} beside {size:.2e}"


@every_form
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 5), (63, 64), (1, 65, 33), (3, 130, 96), (1, 1, 1)])
def test_output_and_gradients(form, shape):
    check(form, torch.randn(shape), torch.randn(shape[-1]))


@every_form
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-12)])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_dtypes(form, dtype, tolerance, weight_dtype):
    x = torch.randn(4, 7, 48, dtype=dtype)
    weight = torch.randn(48, dtype=torch.promote_types(weight_dtype or dtype, dtype))
    if form == "cpu" and dtype == torch.float64:
        with pytest.raises(ConfigError, match="fp32"):
            rms_norm(x, weight, EPS, form)
        return
    check(form, x, weight, tolerance)


@every_form
def test_zeros_and_large_numbers(form):
    x = torch.randn(4, 32)
    x[0] = 0
    x[1] *= 1e-12
    x[2] *= 1e12
    check(form, x, torch.randn(32))


@every_form
def test_rows_of_a_wider_matrix_and_other_strides(form):
    wide = torch.randn(3, 50, 100)
    weight = torch.randn(40)
    check(form, wide[..., 10:50], weight)
    check(form, wide[:, ::2, 10:50], weight)
    check(form, wide[..., :40].transpose(0, 1), weight)
    check(form, wide.transpose(1, 2)[..., :40], weight)


@every_form
def test_expanded_upstream_gradients_and_no_rows(form):
    x, weight = torch.randn(6, 16, requires_grad=True), torch.randn(16)
    rms_norm(x, weight, EPS, form).sum().backward()
    _, (want, _) = gradients(truth, (x.double(), weight.double()), torch.ones(6, 16))
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-4, atol=1e-5)
    assert rms_norm(x[:0], weight, EPS, form).shape == (0, 16)


@pytest.mark.parametrize("form", ["reference", "blocked"])
def test_gradcheck(form):
    parts = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True), torch.randn(5).double().requires_grad_()
    torch.autograd.gradcheck(lambda *p: rms_norm(*p, EPS, form), parts)


def test_weight_gradient_has_the_same_bits_from_run_to_run():
    x, weight, upstream = torch.randn(999, 64), torch.randn(64), torch.randn(999, 64)
    runs = [gradients(lambda *p: rms_norm(*p, EPS, "cpu"), (x, weight), upstream)[1][1] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_fp64_runs_by_itself_and_bad_input_is_named():
    assert rms_norm(torch.randn(2, 4).double(), torch.ones(4), EPS).dtype == torch.float64
    with pytest.raises(ValueError, match=r"weight \(3,\)"):
        rms_norm(torch.randn(2, 4), torch.ones(3), EPS)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 3, 5), (25, 33)])
def test_triton_output_and_gradients(shape):
    check("triton", torch.randn(shape), torch.randn(shape[-1]))


@needs_triton
def test_triton_slices_and_fp16():
    check("triton", torch.randn(2, 9, 32)[:, ::2, 7:20], torch.randn(13))
    check("triton", torch.randn(2, 5, 16).half(), torch.randn(16), tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@needs_triton
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_triton_on_a_card(dtype, tolerance):
    for shape in ((3, 700, 2048), (5, 96), (2, 3, 4096)):
        check("triton", torch.randn(shape).to(dtype), torch.randn(shape[-1]), tolerance)

"""thin_linear against products in float64."""

import pytest
import torch

from mmcore.errors import HardwareError
from mmcore.kernels import native
from mmcore.kernels.thin_linear import MOST_ROWS, thin_linear, thin_linears

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
IMPLEMENTATIONS = ["auto", "blocked", "reference", pytest.param("cpu", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def inference_with_nan_in_fresh_memory():
    """No gradients, and torch.empty gives NaN, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


def error(got, x, weight):
    """The largest error over the scale of rounding: |x| |w| summed in fp32."""
    expected = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T
    assert got.shape == expected.shape and got.dtype == torch.float32 and got.is_contiguous()
    return float(((got.double() - expected).abs() / scale.clamp(min=1e-30)).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 7, 16, 33, 512, 1536, 1543])
def test_every_number_of_rows(implementation, dtype, width):
    for rows in range(1, MOST_ROWS + 1):
        for out in (1, 2, 3, 5, 50):
            x, weight = torch.randn(rows, width), torch.randn(out, width).to(dtype)
            assert error(thin_linear(x, weight, implementation=implementation), x, weight) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_matrices_in_one_call(implementation, dtype, threads):
    """Sizes that put the borders of the threads' slices inside matrices, and matrices inside slices."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for lead in ((1,), (1, 1), (3, 1), (2, 4), ()):
            x = torch.randn(*lead, 512)
            weights = [torch.randn(out, 512).to(dtype) for out in (64, 1, 700, 33, 8, 8, 129)]
            results = thin_linears(x, weights, implementation=implementation)
            assert [tuple(result.shape) for result in results] == [(*lead, len(weight)) for weight in weights]
            for result, weight in zip(results, weights, strict=True):
                assert error(result, x, weight) < 1e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_and_infinity_pass_through_where_they_belong(implementation):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(2, 37), torch.randn(9, 37).to(dtype)
        weight[4, 36], weight[7, 3], x[1, 5] = float("inf"), float("nan"), float("nan")
        finite = thin_linear(x, weight, implementation=implementation).isfinite()
        assert finite[0].tolist() == [o not in (4, 7) for o in range(9)] and not finite[1].any()


def test_more_rows_other_dtypes_and_strides_are_right_too():
    for x, weight in (
        (torch.randn(MOST_ROWS + 1, 24), torch.randn(10, 24)),
        (torch.randn(2, 50, 24), torch.randn(10, 24).bfloat16()),
        (torch.randn(3, 24), torch.randn(10, 24).half()),
        (torch.randn(3, 24), torch.randn(24, 10).T),
        (torch.randn(24, 3).T, torch.randn(10, 24)),
        (torch.randn(3, 4, 48)[..., ::2], torch.randn(10, 24)),
        (torch.randn(0, 24), torch.randn(10, 24)),
        (torch.randn(3, 24), torch.randn(0, 24)),
    ):
        expected = x.double() @ weight.double().T
        torch.testing.assert_close(thin_linear(x, weight).double(), expected, rtol=1e-4, atol=1e-4)
    assert thin_linear(torch.randn(2, 8, dtype=torch.float64), torch.randn(3, 8)).dtype == torch.float64
    assert thin_linears(torch.randn(1, 8), []) == []


@needs_compiler
def test_the_compiled_kernel_refuses_what_it_cannot_compute():
    for x, weight, reason in (
        (torch.randn(MOST_ROWS + 1, 8), torch.randn(3, 8), "x has 17 rows, and the kernel is for 1 to 16"),
        (torch.randn(1, 8).double(), torch.randn(3, 8), "x is torch.float64"),
        (torch.randn(1, 8), torch.randn(3, 8).half(), "the weights are torch.float16"),
        (torch.randn(1, 8), torch.randn(8, 3).T, "not contiguous"),
    ):
        with pytest.raises(HardwareError, match=reason):
            thin_linear(x, weight, implementation="cpu")


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"x is \[1, 8\] and a weight \[3, 7\]: give \[3, 8\]"):
        thin_linear(torch.randn(1, 8), torch.randn(3, 7))
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        thin_linear(torch.randn(1, 8), torch.randn(3, 8, requires_grad=True))


def test_weights_may_change_place_and_value_between_calls():
    """Addresses are read at every call: nothing stale survives `module.to` or an update in place."""
    layer, x = torch.nn.Linear(24, 10, bias=False), torch.randn(1, 24)
    thin_linear(x, layer.weight)
    layer.weight.mul_(2)
    assert error(thin_linear(x, layer.weight), x, layer.weight) < 1e-6
    layer.to(torch.bfloat16)
    assert error(thin_linear(x, layer.weight), x, layer.weight) < 1e-6

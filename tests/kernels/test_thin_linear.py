"""thin_linear against products in float64."""

import pytest
import torch

from mmcore.errors import HardwareError
from mmcore.kernels import native
from mmcore.kernels.thin_linear import MOST_ROWS, thin_linear
from tests.helpers.narrow import exact_weight, product_error

needs_compiler = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
IMPLEMENTATIONS = ["auto", "blocked", "reference", pytest.param("cpu", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def inference_with_nan_in_fresh_memory():
    """No gradients, and torch.empty gives NaN, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        yield
    torch.use_deterministic_algorithms(False)


DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def random_weight(out, width, dtype):
    """A weight of the dtype and the scales that int8 wants."""
    if dtype is torch.int8:
        return torch.randint(-127, 128, (out, width)).to(dtype), torch.rand(out) + 0.1
    return torch.randn(out, width).to(dtype), None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 33, 512, 1536, 1543])
def test_every_number_of_rows(implementation, dtype, width):
    for rows in range(1, MOST_ROWS + 1):
        for out in (1, 2, 3, 5, 50):
            x, (weight, scale) = torch.randn(rows, width), random_weight(out, width, dtype)
            assert product_error(thin_linear(x, weight, scale, implementation=implementation), x, weight, scale) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_threads(implementation, dtype, threads):
    """Enough rows of weights that all threads get some, and not equally many."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for lead in ((1,), (1, 1), (3, 1), (2, 4), ()):
            x, (weight, scale) = torch.randn(*lead, 512), random_weight(701, 512, dtype)
            assert product_error(thin_linear(x, weight, scale, implementation=implementation), x, weight, scale) < 1e-6
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_and_infinity_pass_through_where_they_belong(implementation):
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(2, 37), torch.randn(9, 37).to(dtype)
        weight[4, 36], weight[7, 3], x[1, 5] = float("inf"), float("nan"), float("nan")
        finite = thin_linear(x, weight, implementation=implementation).isfinite()
        assert finite[0].tolist() == [o not in (4, 7) for o in range(9)] and not finite[1].any()
    for bad in (float("nan"), float("inf")):
        x, (weight, scale) = torch.randn(2, 37), random_weight(9, 37, torch.int8)
        x[1, 5] = bad
        finite = thin_linear(x, weight.clamp(min=1), scale, implementation=implementation).isfinite()
        assert finite[0].all() and not finite[1].any()


@needs_compiler
@pytest.mark.parametrize("width", [512, 4095, 8191, 9000, 40_000])
def test_int8_sums_do_not_overflow(width):
    """All products at their largest and of one sign: 32 bits hold no more than 8,192 of them in a lane's 512."""
    x, weight, scale = torch.full((3, width), 5.0), torch.full((4, width), -128).to(torch.int8), torch.ones(4)
    torch.testing.assert_close(thin_linear(x, weight, scale, implementation="cpu"), torch.full((3, 4), -640.0 * width))


@needs_compiler
def test_rounding_x_costs_int8_little():
    """Also with a number a thousand times as large as the rest: next to int8's own error, 0.5 / 127 of a row's largest."""
    x, weight = torch.randn(8, 4096), torch.randn(64, 4096)
    x[:, 7] *= 1000
    scale = weight.abs().amax(1) / 127
    whole = (weight / scale[:, None]).round()
    exact = x.double() @ exact_weight(whole, scale).T
    by_x = (thin_linear(x, whole.to(torch.int8), scale, implementation="cpu").double() - exact).norm()
    by_weights = (exact - x.double() @ weight.double().T).norm()
    assert by_x < 0.2 * by_weights


@needs_compiler
def test_numbers_below_the_normal_ones_and_zeros():
    weight, scale = random_weight(5, 40, torch.int8)
    for x in (torch.zeros(2, 40), torch.full((2, 40), 1e-40)):
        assert thin_linear(x, weight, scale, implementation="cpu").abs().max() < 1e-35
    small = torch.randn(2, 40) * 1e-30
    torch.testing.assert_close(
        thin_linear(small, weight, scale, implementation="cpu").double(), small.double() @ exact_weight(weight, scale).T,
        rtol=1e-2, atol=1e-31,
    )  # fmt: skip


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


@needs_compiler
def test_the_compiled_kernel_refuses_what_it_cannot_compute():
    for x, weight, reason in (
        (torch.randn(MOST_ROWS + 1, 8), torch.randn(3, 8), "x has 17 rows, and the kernel is for 1 to 16"),
        (torch.randn(1, 8).double(), torch.randn(3, 8), "x is torch.float64"),
        (torch.randn(1, 8), torch.randn(3, 8).half(), "the weight is torch.float16"),
        (torch.randn(1, 8), torch.ones(3, 8, dtype=torch.int8), "torch.int8 with scales"),
        (torch.randn(1, 8), torch.randn(8, 3).T, "no contiguous"),
    ):
        with pytest.raises(HardwareError, match=reason):
            thin_linear(x, weight, implementation="cpu")


def test_misuse_is_named():
    with pytest.raises(ValueError, match=r"x is \[1, 8\] and the weight \[3, 7\]: give"):
        thin_linear(torch.randn(1, 8), torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"the weight \[3, 8\] with scales \[2\]"):
        thin_linear(torch.randn(1, 8), torch.ones(3, 8, dtype=torch.int8), torch.ones(2))
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        thin_linear(torch.randn(1, 8), torch.randn(3, 8, requires_grad=True))


def test_weights_may_change_place_and_value_between_calls():
    """Addresses are read at every call: nothing stale survives `module.to` or an update in place."""
    layer, x = torch.nn.Linear(24, 10, bias=False), torch.randn(1, 24)
    thin_linear(x, layer.weight)
    layer.weight.mul_(2)
    assert product_error(thin_linear(x, layer.weight), x, layer.weight) < 1e-6
    layer.to(torch.bfloat16)
    assert product_error(thin_linear(x, layer.weight), x, layer.weight) < 1e-6


@needs_compiler
def test_sums_of_bytes_do_not_run_over():
    """Rows of 70,000 weights, all of them and x as large as they can be."""
    for rows in (2, 3, 16):
        weight = torch.full((17, 70_000), -128, dtype=torch.int8)
        y = thin_linear(torch.ones(rows, 70_000), weight, torch.ones(17), implementation="cpu")
        torch.testing.assert_close(y, torch.full((rows, 17), 70_000 * -128.0), rtol=2e-7, atol=0)  # parts are added in fp32

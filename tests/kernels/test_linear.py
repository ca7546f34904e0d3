"""linear against products in float64, forward and backward."""

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmcore.errors import HardwareError
from mmcore.kernels.linear import cpu, linear, reference
from mmcore.kernels.thin_linear import thin_linear
from tests.helpers.forms import CPU, ON_GPU, needs_compiler
from tests.helpers.narrow import product_error
from tests.helpers.poison import poisoned_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FORMS = ["auto", "blocked", "reference", CPU]


def error(got, expected, rounding):
    """The largest error over the sum of absolute products, which is the scale of rounding in fp32."""
    assert got.shape == expected.shape and got.dtype == torch.float32
    return float(((got.double() - expected).abs() / rounding.clamp(min=1e-30)).max()) if got.numel() else 0.0


def check(form, x, weights):
    """Outputs and all gradients, for random upstream gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    ys = linear(leaves[0], leaves[1:], implementation=form)
    ups = [torch.randn(y.shape) for y in ys]
    grad_x, *grad_weights = torch.autograd.grad(ys, leaves, ups)
    x, weights, ups = x.double(), [w.double() for w in weights], [u.double() for u in ups]
    flat = x.reshape(-1, x.shape[-1])
    for y, weight, up, grad in zip((y.detach() for y in ys), weights, ups, grad_weights, strict=True):
        assert error(y, x @ weight.T, x.abs() @ weight.abs().T) < 1e-6
        up = up.reshape(-1, up.shape[-1])
        assert error(grad, up.T @ flat, up.abs().T @ flat.abs()) < 1e-6
    total = sum(up @ weight for up, weight in zip(ups, weights, strict=True))
    assert error(grad_x, total, sum(u.abs() @ w.abs() for u, w in zip(ups, weights, strict=True))) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 14, 15, 63, 64, 65, 300])
@pytest.mark.parametrize("outs", [(1,), (32,), (5, 40), (64, 8, 8, 70)], ids=str)
@pytest.mark.parametrize("inside", [1, 37, 64])
def test_sizes(form, rows, outs, inside):
    check(form, torch.randn(rows, inside), [torch.randn(out, inside) for out in outs])


@pytest.mark.parametrize("form", ["blocked", CPU])
@pytest.mark.parametrize("rows, outs, inside", [(600, (300, 8, 8), 520), (1000, (33,), 1100), (257, (600, 600), 513)])
def test_more_than_a_round_of_panels(form, rows, outs, inside):
    check(form, torch.randn(rows, inside), [torch.randn(out, inside) for out in outs])


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    x, weights, ups = torch.randn(500, 300), [torch.randn(out, 300) for out in (400, 9)], None
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            ys = cpu.products(x, weights)
            ups = ups or [torch.randn(y.shape) for y in ys]
            grads = cpu.weight_gradients(ups, x, [torch.empty(w.shape) for w in weights])
            found.append([*ys, cpu.input_gradient(ups, weights, torch.empty(x.shape)), *grads])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", ["blocked", CPU])
def test_strides_leading_axes_and_emptiness(form):
    for x in (torch.randn(2, 5, 24), torch.randn(3, 4, 48)[..., ::2], torch.randn(24, 7).T, torch.randn(6, 48)[:, 24:],
              torch.randn(0, 24), torch.randn(24)):  # fmt: skip
        check(form, x, [torch.randn(10, 24), torch.randn(24, 3).T])


@needs_compiler
@pytest.mark.parametrize("rows", [1, 17, 100, 400])
@pytest.mark.parametrize("inside", [1, 37, 530, 1100])
def test_narrow_weights_without_gradients(rows, inside):
    x, outs = torch.randn(rows, inside), (40, 7)
    halves = [torch.randn(out, inside).bfloat16() for out in outs]
    bytes_ = [torch.randint(-128, 128, (out, inside)).to(torch.int8) for out in outs]
    scales = [torch.rand(out) + 0.1 for out in outs]
    with torch.no_grad():
        for y, weight in zip(linear(x, halves, implementation="cpu"), halves, strict=True):
            assert product_error(y, x, weight) < 1e-6
        for y, weight, scale in zip(linear(x, bytes_, scales, implementation="cpu"), bytes_, scales, strict=True):
            assert product_error(y, x, weight, scale) < 1e-6


@needs_compiler
@pytest.mark.parametrize("rows, threads, inside", [
    (2_100, 1, 513), (2_100, 3, 513), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4_100, 2, 1_100), (6_500, 3, 513))),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_more_rows_than_are_kept_from_round_to_round(rows, threads, inside, dtype):
    """Panels of several rounds, and more tiles of x than a thread keeps (64), by columns and by rows, and for one of two
    threads alone; the number of threads changes no bit."""
    x, weight = torch.randn(rows, inside), torch.randn(1_600 if rows < 4_000 else 600, inside)
    scale = torch.rand(len(weight)) + 0.1 if dtype is torch.int8 else None
    weight = torch.randint(-128, 128, weight.shape).to(dtype) if dtype is torch.int8 else weight.to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        (y,) = cpu.products(x, [weight], None if scale is None else [scale])
    finally:
        torch.set_num_threads(before)
    assert product_error(y, x, weight, scale) < 1e-6
    (part,) = cpu.products(x[-70:], [weight], None if scale is None else [scale])
    assert torch.equal(part, y[-70:])


rounds = pytest.mark.skipif(not cpu.multiplies_bf16(), reason="this processor has no products of bf16")


@rounds
@pytest.mark.parametrize("rows, outs, inside", [(1, (1,), 1), (17, (5, 40), 37), (31, (64, 7, 9), 64), (600, (300, 7, 8), 521),
                                                (1000, (33,), 1100), (257, (601, 600), 513)])  # fmt: skip
def test_autocast_in_bf16_rounds_operands_and_nothing_else(rows, outs, inside):
    """Outputs and gradients against float64 products of what rounding leaves: sums and results are fp32."""
    x, weights = torch.randn(rows, inside), [torch.randn(out, inside) for out in outs]
    leaves = [t.requires_grad_() for t in (x, *weights)]
    with torch.autocast("cpu", torch.bfloat16):
        ys = linear(x, weights)
    ups = [torch.randn(y.shape) for y in ys]
    grad_x, *grad_weights = torch.autograd.grad(ys, leaves, ups)
    x, *weights = (t.detach().bfloat16().double() for t in leaves)
    ups = [up.bfloat16().double() for up in ups]
    for y, weight, up, grad in zip(ys, weights, ups, grad_weights, strict=True):
        assert error(y.detach(), x @ weight.T, x.abs() @ weight.abs().T) < 1e-6
        assert error(grad, up.T @ x, up.abs().T @ x.abs()) < 1e-6
    total = sum(up @ weight for up, weight in zip(ups, weights, strict=True))
    assert error(grad_x, total, sum(u.abs() @ w.abs() for u, w in zip(ups, weights, strict=True))) < 1e-6


@rounds
@pytest.mark.parametrize("x_is_narrow", [False, True])
@pytest.mark.parametrize("rows, outs, inside", [(1, (1,), 1), (17, (5, 40), 37), (31, (64, 7, 9), 64), (600, (300, 7, 8), 521),
                                                (100, (33,), 1100), (257, (1601, 600), 513)])  # fmt: skip
def test_bf16_in_memory_is_rounding_and_nothing_else(rows, outs, inside, x_is_narrow):
    """Results, and gradients of a bf16 x, are the bits of the fp32 ones rounded; upstream gradients are bf16 then."""
    x, weights = torch.randn(rows, inside).bfloat16().float(), [torch.randn(out, inside) for out in outs]
    ups = [torch.randn(rows, out).bfloat16() for out in outs]
    found = []
    for narrow in (False, True):
        given = x.bfloat16() if narrow and x_is_narrow else x
        leaves = [t.clone().requires_grad_() for t in (given, *weights)]
        with torch.autocast("cpu", torch.bfloat16):
            ys = linear(leaves[0], leaves[1:], narrow=narrow)
            with torch.no_grad():
                assert all(torch.equal(*pair) for pair in zip(ys, linear(given, weights, narrow=narrow), strict=True))
        assert all(y.dtype == (torch.bfloat16 if narrow else torch.float32) for y in ys)
        grads = torch.autograd.grad(ys, leaves, [up if narrow else up.float() for up in ups])
        assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
        found.append([*ys, *grads])
    for wide, narrow in zip(*found, strict=True):
        assert torch.equal(wide.to(narrow.dtype), narrow)


@rounds
def test_bf16_in_memory_with_other_strides_missing_gradients_and_no_rows():
    x, weights = torch.randn(6, 10, 80).bfloat16(), [torch.randn(out, 40).requires_grad_() for out in (9, 64)]
    with torch.autocast("cpu", torch.bfloat16):
        for part in (x[..., 40:], x[..., ::2], x[:, ::3, :40], x[0, 0, :40], x[:0, :, :40]):
            leaf = part.float().requires_grad_()
            y = linear(part.detach().requires_grad_(), weights, narrow=True)[1]
            wide = linear(leaf, weights)[1]
            assert torch.equal(y, wide.bfloat16())
            grads, wanted = torch.autograd.grad(y.sum(), weights[1]), torch.autograd.grad(wide.sum(), weights[1])
            assert torch.equal(grads[0], wanted[0])


@rounds
def test_rounded_products_without_gradients_and_of_numbers_that_are_none():
    x, weight = torch.randn(40, 70), torch.randn(9, 70)
    x[3, 5], x[4, 6], x[5] = torch.nan, torch.inf, 1e-40
    with torch.autocast("cpu", torch.bfloat16):
        (traced,) = linear(x.clone().requires_grad_(), [weight])
        with torch.no_grad():
            (y,) = linear(x, [weight])
    assert torch.equal(y[6:], traced.detach()[6:])
    assert y[3].isnan().all() and not y[4].isfinite().any() and y[5].abs().max() < 1e-36
    assert y[torch.arange(40) >= 5].isfinite().all()


@rounds
@pytest.mark.parametrize("narrow", [False, True])
def test_a_traced_graph_rounds_as_autocast_says(narrow):
    traced = torch.compile(lambda x, weight: linear(x, [weight], narrow=narrow)[0], backend="aot_eager", fullgraph=True)
    x, weight = torch.randn(40, 70, requires_grad=True), torch.randn(9, 70, requires_grad=True)
    for half in (True, False):
        found = []
        for function in (traced, lambda x, weight: linear(x, [weight], narrow=narrow)[0]):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = function(x, weight)
            found.append([y.detach(), *torch.autograd.grad(y.sum(), (x, weight))])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@rounds
def test_the_number_of_threads_changes_nothing_rounded(monkeypatch):
    products = {name: functools.partial(getattr(cpu, name), rounded=True)
                for name in ("products", "weight_gradients", "input_gradient")}  # fmt: skip
    for name, product in products.items():
        monkeypatch.setattr(cpu, name, product)
    test_the_number_of_threads_changes_nothing(3)


@needs_compiler
def test_few_and_many_rows_of_int8_are_rounded_alike():
    """A conversation's numbers must not depend on how many tokens are read at once."""
    x, weight, scale = torch.randn(40, 530), torch.randint(-127, 128, (64, 530)).to(torch.int8), torch.rand(64)
    (many,) = linear(x, [weight], [scale], implementation="cpu")
    rounding = x[:9].abs() @ (weight * scale[:, None]).abs().T
    assert ((thin_linear(x[:9], weight, scale) - many[:9]).abs() < 1e-6 * rounding).all()


@needs_compiler
def test_what_needs_no_gradient_gets_none():
    x, weights = torch.randn(20, 6), [torch.randn(5, 6, requires_grad=True), torch.randn(3, 6)]
    first, second = linear(x, weights, implementation="cpu")
    (grad,) = torch.autograd.grad(first.sum(), weights[0])
    torch.testing.assert_close(grad, x.sum(0).expand(5, 6))
    x.requires_grad_()
    _, second = linear(x, weights, implementation="cpu")
    (grad,) = torch.autograd.grad(second.sum(), x)
    torch.testing.assert_close(grad, weights[1].sum(0).expand(20, 6))


@needs_compiler
def test_torchs_counter_sees_the_products():
    x, weights = torch.randn(2, 20, 6, requires_grad=True), [torch.randn(5, 6, requires_grad=True) for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        first, second = linear(x, weights, implementation="cpu")
        (first.sum() + second.sum()).backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 6 * 10


def test_autocast_and_other_dtypes_take_the_library(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, [weight])[0].dtype == torch.bfloat16
    assert linear(x.double(), [weight.double()])[0].dtype == torch.float64


def test_thin_matrices_together_give_what_they_give_apart():
    """As a GPU takes them: outputs in the order of the weights, gradients to each."""
    x = torch.randn(2, 30, 8, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (reference.THIN, 100, 3, 1)]
    upstream = [torch.randn(2, 30, len(weight), dtype=torch.float64) for weight in weights]
    apart = [x @ weight.T for weight in weights]
    together = reference.thin_together(x, weights, [None] * len(weights))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(*(torch.autograd.grad(side, [x, *weights], upstream) for side in (together, apart)), strict=True):
        torch.testing.assert_close(one, other)


@needs_compiler
def test_misuse_is_named():
    x = torch.randn(20, 8)
    with pytest.raises(ValueError, match=r"x is \[20, 8\] and a weight \[3, 7\]: give \[out, 8\]"):
        linear(x, [torch.randn(3, 7)])
    for bad, weight, scales, reason in (
        (x.double(), torch.randn(3, 8), None, "x is torch.float64"),
        (x, torch.randn(3, 8).half(), None, "a weight torch.float16"),
        (x, torch.ones(3, 8, dtype=torch.int8), None, "have scales"),
        (x.clone().requires_grad_(), torch.randn(3, 8).bfloat16(), None, "want weights of torch.float32"),
    ):
        with pytest.raises(HardwareError, match=reason):
            linear(bad, [weight], scales, implementation="cpu")


@pytest.mark.parametrize("shape", [(2, 65), (1,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_rounded_weight_is_not_rounded(dtype, shape):
    """What a GPU computes under autocast, its product in fp32 out of 16 bits replaced by one in fp32."""
    x = torch.randn(*shape, 48).to(dtype).requires_grad_()
    weight = torch.randn(40, 48, requires_grad=True)
    y = reference.NarrowProduct.apply(x, weight)
    up = torch.randn(*shape, 40).to(dtype)
    grad_x, grad_weight = torch.autograd.grad(y, [x, weight], up)
    assert y.dtype == grad_x.dtype == dtype and grad_weight.dtype == torch.float32
    rounded, flat, upstream = weight.detach().to(dtype), x.detach().view(-1, 48), up.view(-1, 40)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, rounded), rtol=0, atol=0)
    torch.testing.assert_close(grad_x, up @ rounded, rtol=0, atol=0)
    wanted = upstream.double().T @ flat.double()
    assert error(grad_weight, wanted, upstream.double().abs().T @ flat.double().abs()) < 1e-6


@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_autocast_takes_it(compiled):
    x = torch.randn(2048, 256, device="cuda").bfloat16()
    weights = [torch.randn(out, 256, device="cuda", requires_grad=True) for out in (128, 16, 16)]

    def run(x, *weights):
        with torch.autocast("cuda", torch.bfloat16):
            return linear(x, weights)

    ys = (torch.compile(run) if compiled else run)(x, *weights)
    ups = [torch.randn_like(y) for y in ys]
    for y, weight, up, grad in zip(ys, weights, ups, torch.autograd.grad(ys, weights, ups), strict=True):
        torch.testing.assert_close(y, torch.nn.functional.linear(x, weight.bfloat16()), rtol=2e-2, atol=1e-2)
        wanted = up.double().T @ x.double()
        assert error(grad, wanted, up.double().abs().T @ x.double().abs()) < 1e-6

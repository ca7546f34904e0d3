"""linear_cross_entropy against the plain equations in float64, and against its own promises."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from mmcore.errors import ConfigError
from mmcore.kernels.linear.cpu import multiplies_bf16
from mmcore.kernels.linear_cross_entropy import IGNORED, blocked, cpu, linear_cross_entropy
from tests.helpers.forms import CPU, DEVICE, needs_compiler, needs_triton

IMPLEMENTATIONS = ["reference", "blocked", CPU]
# N, d, V: odd everywhere; fewer words than a vector has lanes; one word; several chunks of rows.
SHAPES = [(63, 17, 101), (5, 3, 5), (4, 2, 1), (1, 8, 32), (40, 6, 1009)]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """torch.empty gives NaN, so that whatever a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(blocked, "chunk_rows", lambda vocabulary, device: 16)


def draw(n, d, v, *, ignored=0.0, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64) * scale
    labels = torch.randint(0, v, (n,), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(n, generator=generator) < ignored, IGNORED)


def truth(hidden, weight, labels, upstream_rows):
    """Losses [N] and both gradients of sum_n upstream_n loss_n, row by row from the equation, in float64."""
    losses, grad_hidden, grad_weight = [], torch.zeros_like(hidden), torch.zeros_like(weight)
    for n, label in enumerate(labels.tolist()):
        if label == IGNORED:
            losses.append(0.0)
            continue
        logits = weight @ hidden[n]
        top = logits.max()
        log_sum = top + (logits - top).exp().sum().log()
        losses.append(float(log_sum - logits[label]))
        delta = (logits - log_sum).exp()
        delta[label] -= 1
        grad_hidden[n] = upstream_rows[n] * (delta @ weight)
        grad_weight += upstream_rows[n] * torch.outer(delta, hidden[n])
    return torch.tensor(losses, dtype=torch.float64), grad_hidden, grad_weight


def run(hidden, weight, labels, dtype, upstream, **options):
    device = DEVICE if options.get("implementation") == "triton" else "cpu"
    hidden = hidden.to(device, dtype, copy=True).requires_grad_()
    weight = weight.to(device, dtype, copy=True).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels.to(device), **options)
    loss.backward(upstream.to(device, loss.dtype))
    return loss.detach().cpu(), hidden.grad.cpu(), weight.grad.cpu()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ignored", [0.0, 0.05, 0.6])
def test_equals_the_equation(few_rows, implementation, reduction, shape, ignored):
    hidden, weight, labels = draw(*shape, ignored=ignored)
    kept = int((labels != IGNORED).sum())
    upstream = torch.randn(shape[0] if reduction == "none" else (), dtype=torch.float64)
    rows = upstream / max(1, kept) if reduction == "mean" else upstream
    losses, grad_hidden, grad_weight = truth(hidden, weight, labels, rows.expand(shape[0]))
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(1, kept)}[reduction]
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        results = run(hidden, weight, labels, dtype, upstream, reduction=reduction, implementation=implementation)
        for result, target in zip(results, (expected, grad_hidden, grad_weight), strict=True):
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), target, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", ["auto", "blocked"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_have_statistics_in_fp32(few_rows, implementation, dtype, tolerance):
    hidden, weight, labels = draw(100, 32, 501, ignored=0.1, scale=0.2)
    hidden, weight = hidden.to(dtype).double(), weight.to(dtype).double()
    kept = int((labels != IGNORED).sum())
    upstream = torch.tensor(3.0)
    losses, grad_hidden, grad_weight = truth(hidden, weight, labels, torch.full((100,), 3.0 / kept))
    loss, got_hidden, got_weight = run(hidden, weight, labels, dtype, upstream, implementation=implementation)
    assert loss.dtype == torch.float32 and got_hidden.dtype == got_weight.dtype == dtype
    assert abs(float(loss) - float(losses.sum() / kept)) < tolerance
    for got, target in ((got_hidden, grad_hidden), (got_weight, grad_weight)):
        assert float((got.double() - target).norm() / target.norm()) < tolerance


@pytest.mark.parametrize("implementation", ["auto", "blocked"])
def test_small_gradients_survive_fp16(implementation):
    """1 / N and a small upstream number are applied in fp32: p / N alone would be 0 in fp16."""
    hidden, weight, labels = draw(64, 16, 4001, scale=0.01)
    _, _, grad_weight = run(
        hidden, weight, labels, torch.float16, torch.tensor(2.0**10), implementation=implementation
    )
    target = truth(hidden.half().double(), weight.half().double(), labels, torch.full((64,), 16.0))[2]
    assert float((grad_weight.double() - target).norm() / target.norm()) < 5e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_of_any_size_stay_finite(implementation):
    hidden, weight, labels = draw(33, 8, 77, scale=2000.0)
    losses, grad_hidden, _ = truth(hidden, weight, labels, torch.ones(33))
    loss, got, _ = run(hidden, weight, labels, torch.float32, torch.ones(33), reduction="none",
                       implementation=implementation)
    torch.testing.assert_close(loss.double(), losses, rtol=1e-5, atol=1e-2)
    assert got.isfinite().all() and float((got - grad_hidden).norm() / grad_hidden.norm()) < 1e-2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_or_infinite_hidden_state_shows_in_its_row_alone(implementation):
    hidden, weight, labels = draw(12, 4, 50)
    hidden[3, 1], hidden[7, 0] = math.nan, math.inf
    losses = linear_cross_entropy(hidden.float(), weight.float(), labels, reduction="none",
                                  implementation=implementation)
    assert [n for n, loss in enumerate(losses.tolist()) if not math.isfinite(loss)] == [3, 7]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_label_that_counts_is_loss_0_with_gradient_0(implementation, reduction):
    for n in (9, 0):
        hidden, weight, _ = draw(n, 4, 11)
        labels = torch.full((n,), IGNORED)
        upstream = torch.ones(n if reduction == "none" else ())
        for result in run(hidden, weight, labels, torch.float32, upstream, reduction=reduction,
                          implementation=implementation):
            assert bool((result == 0).all())


@pytest.mark.parametrize("ignored", [0.02, 0.5])
def test_an_ignored_row_may_hold_anything_finite(ignored):
    hidden, weight, labels = draw(64, 6, 30, ignored=ignored)
    changed = torch.where(labels[:, None] == IGNORED, 1e3, hidden)
    assert bool((labels == IGNORED).any())
    for first, second in zip(run(hidden, weight, labels, torch.float32, torch.tensor(1.0)),
                             run(changed, weight, labels, torch.float32, torch.tensor(1.0)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_losses_without_gradients_are_the_same(few_rows, implementation):
    hidden, weight, labels = draw(50, 8, 70, ignored=0.1)
    weight = weight.float().requires_grad_()
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "implementation": implementation}
        with torch.no_grad():
            plain = linear_cross_entropy(hidden.float(), weight, labels, **options)
        assert not plain.requires_grad
        assert torch.allclose(plain, linear_cross_entropy(hidden.float(), weight, labels, **options), atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_input_may_need_no_gradient(implementation, frozen):
    hidden, weight, labels = draw(20, 5, 13)
    target = truth(hidden, weight, labels, torch.ones(20))[1 if frozen == "weight" else 2]
    inputs = {"hidden": hidden.float(), "weight": weight.float()}
    learned = inputs["weight" if frozen == "hidden" else "hidden"].requires_grad_()
    linear_cross_entropy(**inputs, labels=labels, reduction="sum", implementation=implementation).backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(learned.grad.double(), target, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(few_rows, reduction):
    hidden, weight, labels = draw(20, 3, 7, ignored=0.1)
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels, reduction=reduction, implementation="blocked"),
        (hidden.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_a_loss_may_be_changed_in_place(implementation, reduction):
    found = []
    for in_place in (False, True):
        hidden, weight, labels = draw(20, 6, 11)
        leaves = [t.float().requires_grad_() for t in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, labels, reduction=reduction, implementation=implementation)
        loss = loss.div_(3).add_(1) if in_place else loss / 3 + 1
        found.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    for wanted, got in zip(*found, strict=True):
        assert torch.allclose(wanted, got, rtol=1e-6)


def test_a_second_backward_pass_through_a_kept_graph_gives_the_same():
    hidden, weight, labels = draw(20, 5, 13)
    hidden = hidden.float().requires_grad_()
    loss = linear_cross_entropy(hidden, weight.float(), labels)
    first = torch.autograd.grad(loss * 3, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss * 3, hidden)[0])


@pytest.mark.parametrize("implementation", ["auto", "blocked"])
def test_autocast_takes_products_in_its_dtype_and_gradients_in_the_weights(implementation):
    hidden, weight, labels = draw(40, 16, 60, scale=0.3)
    leaf_hidden, leaf_weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(leaf_hidden, leaf_weight, labels, implementation=implementation)
    loss.backward()
    expected = F.cross_entropy(hidden.bfloat16().double() @ weight.bfloat16().double().T, labels)
    assert loss.dtype == leaf_weight.grad.dtype == torch.float32 and abs(float(loss.detach() - expected)) < 1e-2
    assert not torch.equal(leaf_weight.grad, leaf_weight.grad.bfloat16().float()), "the weight's gradient was rounded"


@pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no products of bf16")
def test_on_a_cpu_that_multiplies_bf16_only_operands_are_rounded():
    """Against float64: logits of rounded operands, whose softmax less the labels is rounded for both gradients."""
    hidden, weight, labels = draw(700, 33, 61, scale=0.5)
    leaves = [t.float().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*leaves, labels, reduction="sum")
    grad_hidden, grad_weight = torch.autograd.grad(loss, leaves)
    h, w = (t.detach().bfloat16().double() for t in leaves)
    logits = h @ w.T
    want = F.cross_entropy(logits, labels, reduction="sum")
    rounded = (logits.softmax(1) - F.one_hot(labels, len(w))).float().bfloat16().double()
    assert abs(float(loss.detach() - want)) < 1e-6 * float(want)
    # a number halfway between two of bf16 falls to either, by fp32's rounding: 2^-9 of it
    for got, exact, size in ((grad_hidden, rounded @ w, rounded.abs() @ w.abs()),
                             (grad_weight, rounded.T @ h, rounded.abs().T @ h.abs())):  # fmt: skip
        assert float(((got.double() - exact).abs() / size).max()) < 1e-3
        assert float(((got.double() - exact).abs() / size).median()) < 1e-6


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("implementation", ["auto", "blocked"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens_x_vocabulary_never_exists(implementation, reduction):
    n, d, v = 4096, 4, 4100
    hidden, weight, labels = draw(n, d, v)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with _Largest() as seen:
        linear_cross_entropy(hidden, weight, labels, reduction=reduction, implementation=implementation).sum().backward()
    assert n * d <= seen.elements <= 1024 * v


@needs_compiler
def test_exponentials_in_c_over_their_whole_range():
    """softmax of rows that span 0 .. -110 and -inf: relative error 1e-6 down to e^-87, 0 below."""
    logits = -torch.linspace(0, 110, 9001)[None].repeat(2, 1)
    logits[:, 5000] = -math.inf
    expected = torch.softmax(logits.double(), dim=1)
    expected[:, 0] -= 1
    losses = cpu._step(logits, torch.tensor([0, 0]), True)
    assert torch.allclose(losses.double(), -(1 + expected[:, 0]).log(), rtol=1e-6)
    normal = expected.abs() > 1e-38
    assert float(((logits - expected) / expected)[normal].abs().max()) < 1e-6
    assert float(logits[~normal].abs().max()) < 2e-38 and bool((logits[:, 5000] == 0).all())


def test_bad_input_is_named():
    hidden, weight, labels = (tensor.float() if tensor.is_floating_point() else tensor for tensor in draw(6, 4, 9))
    labels[2] = 9
    with pytest.raises(ValueError, match="label 9 lies outside the vocabulary of 9"):
        linear_cross_entropy(hidden, weight, labels)
    labels[2] = -1
    with pytest.raises(ValueError, match="label -1 lies outside the vocabulary of 9"):
        linear_cross_entropy(hidden, weight, labels)
    labels[2] = 0
    with pytest.raises(ValueError, match=r"must be int64 \[6\]"):
        linear_cross_entropy(hidden, weight, labels[:5])
    with pytest.raises(ValueError, match=r"must be \[N, d\] and \[V, d\]"):
        linear_cross_entropy(hidden[:, :3], weight, labels)
    with pytest.raises(ValueError, match="choose one of mean, sum, none"):
        linear_cross_entropy(hidden, weight, labels, reduction="average")
    with pytest.raises(ConfigError, match="no implementation 'fast'"):
        linear_cross_entropy(hidden, weight, labels, implementation="fast")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("label", [9, -1, 10**11])
def test_a_label_outside_the_vocabulary_is_refused_when_a_traced_call_runs(implementation, reduction, label):
    hidden, weight, labels = draw(6, 4, 9, ignored=0.2)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()

    def loss(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, reduction=reduction, implementation=implementation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        graph = make_fx(loss, tracing_mode="fake")(hidden, weight, labels)
    torch.testing.assert_close(graph(hidden, weight, labels), loss(hidden, weight, labels))
    labels[labels != IGNORED] = label
    with pytest.raises((ValueError, RuntimeError), match=rf"label {label} lies outside|index {label} is out of bounds"):
        graph(hidden, weight, labels)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_compiled_loss_refuses_a_label_outside_the_vocabulary(implementation):
    hidden, weight, labels = draw(6, 4, 9, ignored=0.2)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    loss = torch.compile(linear_cross_entropy, fullgraph=True)
    loss(hidden, weight, labels, implementation=implementation).backward()
    for label in (9, -1, 10**11):
        labels[2] = label
        with pytest.raises((ValueError, RuntimeError), match=f"label {label} lies outside|out of bounds"):
            loss(hidden, weight, labels, implementation=implementation)


@needs_triton
@pytest.mark.parametrize("label", [9, -1, 10**11])
def test_triton_gives_nan_for_a_label_outside_the_vocabulary(label):
    """Of its row alone, and without waiting for the GPU."""
    from mmcore.kernels.linear_cross_entropy import triton

    hidden, weight, labels = draw(6, 4, 9)
    labels[:2] = torch.tensor([IGNORED, label])
    logits = (hidden @ weight.T).float().to(DEVICE)
    losses = triton._step(logits, labels.to(DEVICE), True).cpu()
    assert losses[0] == 0 and losses[1].isnan() and losses[2:].isfinite().all()
    assert (logits[0] == 0).all() and logits[1].isnan().all() and logits[2:].isfinite().all()


@needs_triton
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(21, 17, 101), (4, 2, 1)])
def test_triton_equals_the_equation(few_rows, reduction, shape):
    hidden, weight, labels = draw(*shape, ignored=0.1)
    kept = int((labels != IGNORED).sum())
    upstream = torch.randn(shape[0] if reduction == "none" else (), dtype=torch.float64)
    rows = upstream / max(1, kept) if reduction == "mean" else upstream
    losses, *grads = truth(hidden, weight, labels, rows.expand(shape[0]))
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / max(1, kept)}[reduction]
    results = run(hidden, weight, labels, torch.float32, upstream, reduction=reduction, implementation="triton")
    for result, target in zip(results, (expected, *grads), strict=True):
        torch.testing.assert_close(result.double(), target, rtol=2e-5, atol=2e-5)


@needs_triton
def test_triton_reads_half_precision_logits_and_shows_a_nan_in_its_row_alone():
    hidden, weight, labels = draw(30, 16, 150, ignored=0.1, scale=0.2)
    hidden, weight = hidden.half().double(), weight.half().double()
    kept = int((labels != IGNORED).sum())
    losses, *grads = truth(hidden, weight, labels, torch.full((30,), 3.0 / kept))
    loss, *got = run(hidden, weight, labels, torch.float16, torch.tensor(3.0), implementation="triton")
    assert loss.dtype == torch.float32 and abs(float(loss) - float(losses.sum() / kept)) < 2e-3
    for mine, target in zip(got, grads, strict=True):
        assert float((mine.double() - target).norm() / target.norm()) < 3e-3
    labels[[3, 7]] = 0
    hidden[3, 1], hidden[7, 0] = math.nan, math.inf
    losses = linear_cross_entropy(*(x.float().to(DEVICE) for x in (hidden, weight)), labels.to(DEVICE), reduction="none",
                                  implementation="triton")
    assert [n for n, loss in enumerate(losses.tolist()) if not math.isfinite(loss)] == [3, 7]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@needs_triton
def test_triton_on_a_card():
    """The largest vocabulary, several chunks, bf16."""
    hidden, weight, labels = draw(3000, 64, 128_256, ignored=0.1, scale=0.1)
    hidden, weight, labels = hidden.bfloat16().cuda(), weight.bfloat16().cuda(), labels.cuda()
    found = {}
    for form in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, labels, implementation=form)
        loss.backward()
        found[form] = loss.detach().double(), *(x.grad.double() for x in leaves)
    for mine, target in zip(*found.values(), strict=True):
        assert float((mine - target).norm() / target.norm()) < 2e-2

"""Every kernel as an operator of torch: what opcheck asks of it, and a whole block compiled without a break."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from mmcore.kernels import registry
from mmcore.kernels.gated_scan import gated_scan
from mmcore.kernels.linear import linear
from mmcore.kernels.linear_cross_entropy import linear_cross_entropy
from mmcore.kernels.look_ahead import look_ahead
from mmcore.kernels.memory_read import memory_read
from mmcore.kernels.rms_norm import rms_norm
from mmcore.kernels.swiglu import swiglu
from mmcore.kernels.thin_linear import cpu as thin_cpu
from mmcore.kernels.thin_linear import thin_linear
from mmcore.model.documents import packing
from tests.helpers.forms import CPU, ON_GPU, needs_compiler, needs_triton
from tests.helpers.models import random_tokens, tiny

FORMS = ["blocked", CPU]
IN_INTERPRETER = pytest.param(
    "triton", marks=[pytest.mark.slow, needs_triton, pytest.mark.skipif(ON_GPU, reason="these tensors lie on the CPU: needs the interpreter")]
)
B, T, H, D = 2, 9, 2, 4
CHECKED = set()  # operators, and which of their arguments were left out: opcheck takes half a second for each


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def calls(form):
    """One call of each kernel, as a function without arguments, by the kernel's name."""
    keys, gates, decays = draw(B, T, H, D), draw(B, T, H), draw(B, T, H)
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[:, 4] = True
    starts = torch.zeros(B, T, dtype=torch.int32)
    state = (torch.randn(B, H, D), torch.randn(B, H))
    scalars = [draw(H).detach().abs().requires_grad_() for _ in range(3)]
    labels = torch.tensor([0, 3, -100, 7, 5, 1])

    def read(queries, **place):
        return memory_read(queries, keys, draw(B, T, H, D), *scalars, **place, implementation=form)

    def loss(reduction):
        return linear_cross_entropy(draw(6, 5), draw(8, 5), labels, reduction=reduction, implementation=form)

    return {
        "gated_scan": lambda: gated_scan(
            keys, gates, -decays.abs(), resets=resets, state=state, implementation=form
        ),
        "memory_read of its keys": lambda: read(keys, window=5, delay=1),
        "memory_read": lambda: read(draw(B, T, H, D), starts=starts, delay=2, offset=1),
        "look_ahead": lambda: look_ahead(keys, *scalars[:2], implementation=form),
        "rms_norm": lambda: rms_norm(draw(B, T, 6), draw(6), 1e-5, implementation=form),
        "swiglu": lambda: swiglu(draw(B, T, 6), draw(B, T, 6), implementation=form),
        "linear_cross_entropy": lambda: loss("mean"),
        "linear_cross_entropy of rows": lambda: loss("none"),
    }


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the arguments of every operator of ours that is called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mm":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def first_tensor(result):
    return result[0] if isinstance(result, (tuple, list)) else result


def opcheck_everything(work):
    """Run `work` forward and backward, and hold every operator that was met to opcheck with the arguments it had."""
    with Recorded() as seen:
        result = first_tensor(work())
        if result.requires_grad:
            result.sum().backward()
    assert seen.calls
    for func, args in seen.calls:
        optional = tuple(a is None for a in args)
        if (func, optional) in CHECKED:
            continue
        CHECKED.add((func, optional))
        # below autograd no tensor asks for gradients: ask again where the operator has them
        wanted = func in registry.operators(func.__name__.partition(".")[0].rsplit("_", 1)[0])
        opcheck(func, tree_map_only(
            torch.Tensor, lambda a, wanted=wanted: a.detach().clone().requires_grad_(wanted and a.is_floating_point()), args
        ))
    return {func.__name__.removesuffix(".default") for func, _ in seen.calls}


@pytest.mark.slow
@pytest.mark.parametrize("form", [*FORMS, IN_INTERPRETER])
def test_opcheck(form):
    seen = set()
    for work in calls(form).values():
        seen |= opcheck_everything(work)
    kernels = {"gated_scan", "memory_read", "look_ahead", "rms_norm", "swiglu"}
    wanted = {f"{kernel}_{form}{part}" for kernel in kernels for part in ("", "_backward")}
    wanted |= {f"linear_cross_entropy_{part}" for part in ("total", "rows", "rows_backward")}
    assert seen == wanted


@needs_compiler
def test_opcheck_of_linear():
    x, weights = draw(B, T, 6), [draw(5, 6), draw(2, 6)]
    seen = opcheck_everything(lambda: torch.cat(linear(x, weights, implementation="cpu"), -1))
    assert seen == {"linear_cpu", "linear_cpu_backward"}


@needs_compiler
def test_opcheck_of_thin_linear():
    for rows, dtype in ((3, torch.float32), (40, torch.float32), (3, torch.bfloat16)):
        opcheck(thin_cpu.traced, (torch.randn(rows, 6), torch.randn(5, 6).to(dtype), None))


def test_tensors_without_data_pass_through():
    """What a planner, or a build on the meta device, asks."""
    keys = torch.empty(B, T, H, D, device="meta", requires_grad=True)
    scalar = torch.empty(H, device="meta")
    out = memory_read(keys, keys, keys, scalar, scalar, scalar, implementation="blocked")
    assert out.is_meta and out.requires_grad and out.shape == keys.shape


@pytest.mark.parametrize("form", FORMS)
def test_a_selective_policy_keeps_the_named_kernels_results(form):
    """Recomputation with memory_read and gated_scan kept: equal gradients, and neither runs a second time."""
    keys, gates, decays = draw(B, T, H, D), draw(B, T, H), draw(B, T, H)
    scalars = [draw(H).detach().abs().requires_grad_() for _ in range(3)]
    kept = registry.operators("memory_read", "gated_scan")

    def block(raw):
        found, _ = gated_scan(raw, gates, -decays.abs(), implementation=form)
        return memory_read(found, found, raw.sin(), *scalars, delay=1, implementation=form)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    with Recorded() as plain:
        (want,) = torch.autograd.grad(block(keys).square().sum(), keys)
    with Recorded() as seen:
        out = checkpoint(
            block, keys, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
        )
        (got,) = torch.autograd.grad(out.square().sum(), keys)
    assert torch.equal(got, want)
    names = [[func.__name__ for func, _ in record.calls] for record in (plain, seen)]
    assert sorted(names[0]) == sorted(names[1]) and len(names[0]) == 4


@needs_compiler
def test_calls_without_gradients_pass_by_the_dispatcher():
    x, weight = draw(B, 6), draw(5, 6)
    with torch.no_grad(), torch.autograd.profiler.profile(use_kineto=False) as seen:
        for name, work in calls("cpu").items():
            if "linear_cross_entropy" not in name:
                work()
        linear(x, [weight], implementation="cpu")
        thin_linear(x, weight, implementation="cpu")
    names = {event.name for event in seen.function_events}
    assert "aten::empty_like" in names and not any(name.startswith("mm::") for name in names)


def traced(function, example):
    """The function as it is traced by jit.trace and by make_fx, below and above autograd."""
    yield torch.jit.trace(function, (example,), check_trace=False)
    for above in (False, True):
        yield make_fx(lambda x: function(x), pre_dispatch=above)(example)


def flops(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@needs_compiler
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_calls_without_gradients_are_seen_by_who_looks_on():
    """Traced graphs compute, and do not give back memory that was left unwritten; products are counted."""
    weight, thin = draw(6, 6).detach(), draw(5, 6).detach()

    def work(x):
        (y,) = linear(rms_norm(x, weight[0], 1e-5), [weight])
        return thin_linear(swiglu(y, x), thin)

    with torch.no_grad(), Recorded() as seen:
        for name, call in calls("cpu").items():
            if "linear_cross_entropy" not in name:
                call()
    assert len(seen.calls) == 6
    x, other = draw(7, 6).detach(), draw(4, 7, 6)[0].detach()
    with torch.no_grad():
        for function in traced(work, x):
            torch.testing.assert_close(function(other), work(other))
        assert flops(work, x) == 2 * 7 * 6 * (6 + 5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("shape", [(2, 20), (1, 8)])
@pytest.mark.parametrize("change", [lambda model: model, lambda model: model.quantize()], ids=["fp32", "int8"])
def test_a_model_without_gradients_is_seen_by_who_looks_on(shape, change):
    model, tokens, others = change(tiny(num_hidden_layers=1)), random_tokens(*shape), random_tokens(*shape, seed=1)
    with torch.no_grad():
        want, count = model(others), flops(model, tokens)
        for function in traced(model, tokens):
            torch.testing.assert_close(function(others), want, rtol=1e-2, atol=1e-3)
    assert count == flops(model, tokens) > 0


@pytest.mark.slow
def test_a_compiled_mosaic_block_equals_the_plain_one():
    """fullgraph=True: not one break; outputs and all gradients as without the compiler."""
    model = tiny(num_hidden_layers=1).train()
    block = model.model.layers[0]
    where = packing(torch.tensor([[0] * 7 + [1] * 14, [0] * 20 + [1]]))
    x = draw(2, 21, 32)

    def run(function):
        for parameter in block.parameters():
            parameter.grad = None
        out = function(x, where, 5)
        (grad,) = torch.autograd.grad(out.sin().sum(), x, retain_graph=True)
        out.sin().sum().backward()
        return [out.detach(), grad, *(p.grad for p in block.parameters())]

    torch._dynamo.reset()
    plain, compiled = run(block), run(torch.compile(block, fullgraph=True))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # thin products among the calls
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x, where, 5), block(x, where, 5),
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_delay_drawn_anew_for_each_step_is_not_compiled_anew():
    """The first graph holds the delay as a number, the second as a symbol, for all that follow."""
    block = tiny(num_hidden_layers=1).train().model.layers[0]
    x = draw(2, 21, 32)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for delay in (5, 6, 7, 8):
        out = compiled(x, packing(None), delay)
        torch.testing.assert_close(out, block(x, packing(None), delay), rtol=1e-4, atol=1e-5)
        out.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_a_compiled_loss_equals_the_plain_one():
    hidden, weight = draw(12, 8), draw(11, 8)
    labels = random_tokens(12, vocabulary=11)

    def loss(h, w):
        return linear_cross_entropy(h, w, labels, reduction="sum")

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_thin_linear_still_refuses_gradients():
    with pytest.raises(ValueError, match="no gradient"):
        thin_linear(draw(2, 3), draw(4, 3))


def test_compiled_graphs_of_other_versions_are_kept_apart():
    """torch knows an operator by its name alone: with its graphs of a version whose operator gave other shapes, training
    ended at the first step."""
    assert f"mm-{registry._version()}" in torch.compiler.config.cache_key_tag

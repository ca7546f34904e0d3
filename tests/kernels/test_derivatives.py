"""What the kernels have no derivatives of, second ones and forward-mode's: refused, however they are asked for."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jvp
from torch.utils.checkpoint import checkpoint

from mmcore.kernels import dispatch
from mmcore.kernels.gated_scan import gated_scan
from mmcore.kernels.linear import linear
from mmcore.kernels.linear.reference import NarrowProduct
from mmcore.kernels.linear_cross_entropy import linear_cross_entropy
from mmcore.kernels.look_ahead import look_ahead
from mmcore.kernels.memory_read import memory_read
from mmcore.kernels.rms_norm import rms_norm
from mmcore.kernels.swiglu import swiglu
from mmcore.kernels.thin_linear import thin_linear
from tests.helpers.forms import needs_compiler
from tests.helpers.models import random_tokens, tiny
from tests.kernels.test_registry import FORMS, B, T, calls, draw, first_tensor


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_of_a_gradient_is_refused(form):
    x = draw(B, 6)
    y = swiglu(x, x * 2, implementation=form)
    for upstream in (y.square().sum(), y.sum()):  # of the second only what was saved depends on x
        (grad,) = torch.autograd.grad(upstream, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivatives" if form != "reference" else None):
            grad.sum().backward()


def leaves_of(result):
    """The tensors that a result was computed from and that ask for gradients."""
    found, waiting = [], [result.grad_fn]
    while waiting:
        node = waiting.pop()
        found += [node.variable] if hasattr(node, "variable") else []
        waiting += [before for before, _ in node.next_functions if before is not None]
    return found


def assert_no_second_derivatives(result):
    """By whichever tensor they are asked for: also where a gradient does not depend on it, and none is given in part."""
    leaves = leaves_of(result)
    assert leaves
    for grad in torch.autograd.grad(result.sum(), leaves, create_graph=True, allow_unused=True):
        for leaf in leaves if grad is not None else ():
            with pytest.raises(RuntimeError, match="no second derivatives: start Python with MM_KERNELS=reference"):
                torch.autograd.grad(grad.sum(), leaf, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_of_a_gradient_is_refused_by_whichever_tensor(form):
    for work in calls(form).values():
        assert_no_second_derivatives(first_tensor(work()))


@needs_compiler
def test_a_gradient_of_a_gradient_of_linear_is_refused():
    x, weights = draw(B, T, 6), [draw(5, 6), draw(2, 6)]
    assert_no_second_derivatives(torch.cat(linear(x, weights, implementation="cpu"), -1))
    assert_no_second_derivatives(NarrowProduct.apply(x.bfloat16(), weights[0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ask", ["hessian", "hvp", "vhp", "jvp"])
def test_hessians_are_refused_and_jacobians_are_not(form, ask):
    def loss(x, form=form):
        return swiglu(x[None], x[None] * 2, implementation=form).square().sum()

    x = draw(5).detach()
    want = torch.autograd.functional.jacobian(lambda x: loss(x, "reference"), x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(loss, x, create_graph=True), want)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        getattr(torch.autograd.functional, ask)(loss, x, *(() if ask == "hessian" else (x,)))


def test_gradients_that_could_be_differentiated_may_be_used_in_one_graph_with_others():
    """Only what goes through them is refused; under activation checkpointing too."""
    x, other = draw(B, 6), draw(B, 6)

    def gated(x):
        return swiglu(x, x * 2, implementation="blocked")

    for y in (gated(x), checkpoint(gated, x, use_reentrant=False)):
        grad, (plain,) = torch.autograd.grad(y.sum(), x, create_graph=True)[0], torch.autograd.grad(gated(x).sum(), x)
        assert torch.equal(grad, plain)
        (found,) = torch.autograd.grad((grad * other.sin()).sum(), other)
        torch.testing.assert_close(found, plain * other.cos())


def test_the_remedy_for_second_derivatives_is_one(monkeypatch):
    """A model as it is by default has them where MM_KERNELS=reference; against differences of gradients in fp64."""
    monkeypatch.setattr(dispatch, "_FORCED", "reference")
    model, tokens = tiny(num_hidden_layers=1, lively=False), random_tokens(1, 8)
    slope = model.model.layers[0].short_term.bandwidth_slope

    def gradient(**options):
        return torch.autograd.grad(model.loss(tokens, tokens), slope, **options)[0]

    (found,) = torch.autograd.grad(gradient(create_graph=True).sum(), slope)
    model.double()
    step, differences = 1e-4, []
    for head in range(len(slope)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                slope[head] += sign * step
            ends.append(gradient().sum())
            with torch.no_grad():
                slope[head] -= sign * step
        differences.append((ends[0] - ends[1]) / (2 * step))
    torch.testing.assert_close(found.double(), torch.stack(differences), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("recorded", [True, False])
def test_forward_mode_derivatives_are_refused(form, recorded):
    """Whichever of the arguments has a tangent; calls without one go on."""
    x = draw(B, T, 6)
    others = {
        "linear_cpu": lambda x: linear(x, [draw(5, 6), draw(2, 6)])[0],
        "linear_cpu ": lambda x: linear(draw(2, 5), [draw(3, 5), x.flatten(0, 1)[:, :5]])[1],
        "rms_norm": lambda x: rms_norm(draw(B, T, 6), x[0, 0], 1e-5, form),
        "swiglu": lambda x: swiglu(draw(B, T, 6), x, form),
        "linear_cross_entropy": lambda x: linear_cross_entropy(draw(1, 6), x[0], torch.tensor([2]), implementation=form),
        "look_ahead": lambda x: look_ahead(draw(B, T, 2, 3), draw(2), draw(2), following=x[:, 0].unflatten(1, (2, 3)),
                                           implementation=form),
        "gated_scan": lambda x: gated_scan(draw(B, T, 6, 2), draw(B, T, 6), x, implementation=form)[0],
        "memory_read": lambda x: memory_read(*[draw(B, T, 6, 2)] * 3, draw(6), x[0, 0], draw(6), implementation=form),
    }  # fmt: skip
    with forward_ad.dual_level(), torch.set_grad_enabled(recorded):
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        for name, call in others.items():
            if name.strip() != "linear_cpu" or form == "cpu":
                assert forward_ad.unpack_dual(call(x)).tangent is None
                with pytest.raises(RuntimeError, match=f"mm::{name.strip()}.* no forward-mode derivatives: .*MM_KERNELS=ref"):
                    call(dual)
    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        jvp(lambda x: swiglu(x, x * 2, form), (x.detach(),), (x.detach(),))


@needs_compiler
def test_tangents_of_gradients_and_in_decoding_are_refused():
    x, weight = draw(3, 6), draw(5, 6).detach()
    y = swiglu(x, x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), x.detach())
        with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
            torch.autograd.grad(y, x, dual)
        with torch.no_grad(), pytest.raises(RuntimeError, match="thin_linear_cpu has no forward-mode derivatives"):
            thin_linear(dual, weight)
        with torch.no_grad():  # the library's products know the rule
            (product,) = linear(dual, [weight.bfloat16()])
            torch.testing.assert_close(*forward_ad.unpack_dual(product))


def test_the_remedy_for_forward_mode_is_one(monkeypatch):
    monkeypatch.setattr(dispatch, "_FORCED", "reference")
    model, tokens = tiny(num_hidden_layers=1), random_tokens(1, 8)
    parameters = dict(model.named_parameters())
    tangents = {name: draw(*p.shape).detach() for name, p in parameters.items()}

    def loss(parameters):
        return functional_call(model, parameters, (tokens,)).logsumexp(-1).mean()

    gradients = torch.autograd.grad(loss(parameters), list(parameters.values()))
    want = sum((a * b).sum() for a, b in zip(gradients, tangents.values(), strict=True))
    torch.testing.assert_close(jvp(loss, (parameters,), (tangents,))[1], want, rtol=1e-3, atol=1e-4)

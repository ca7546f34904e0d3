"""Forgetting cheap results changes no bit of any gradient, runs no product twice, and makes each result again once."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mmcore.config import ARCHITECTURES, DistributedConfig
from mmcore.distributed.parallelize import parallelize
from mmcore.kernels.recompute import cheap, remake
from tests.helpers.forms import DEVICE, needs_triton
from tests.helpers.models import random_tokens, tiny

SELECTIVE = DistributedConfig(activation_checkpointing="selective")


def gradients(model, half):
    device = next(model.parameters()).device
    tokens = random_tokens(2, 30).to(device)
    documents = torch.arange(30, device=device).div(13, rounding_mode="floor").expand(2, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        loss = model.loss(tokens, tokens, documents, delay=5)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kernels", "half"), [("auto", False), ("blocked", False), ("reference", False), ("blocked", True)])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_are_the_same_to_the_last_bit(kind, kernels, half):
    plain = gradients(tiny(kind, kernels).train(), half)
    again = gradients(parallelize(tiny(kind, kernels).train(), SELECTIVE), half)
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("kind", ["memory_mosaics_v2", "llama"])
@pytest.mark.parametrize("way", ["selective", "full"])
def test_triton_s_operators_can_be_made_again(kind, way):
    """In a block that runs twice an operator's saved tensors may be asked for once."""
    model = tiny(kind, "triton", num_hidden_layers=1).train().to(DEVICE)
    plain = {name: gradient.clone() for name, gradient in gradients(model, False).items()}
    model.zero_grad()
    again = gradients(parallelize(model, DistributedConfig(activation_checkpointing=way)), False)
    for name, gradient in plain.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_product_runs_twice(kind):
    def flops(model):
        with FlopCounterMode(display=False) as counter:
            gradients(model, half=False)
        return counter.get_total_flops()

    plain = flops(tiny(kind, "blocked").train())
    assert flops(parallelize(tiny(kind, "blocked").train(), SELECTIVE)) == plain
    full = DistributedConfig(activation_checkpointing="full")
    assert flops(parallelize(tiny(kind, "blocked").train(), full)) > 1.2 * plain


def test_a_result_is_made_again_once_however_many_ask():
    runs = []

    @cheap
    def twice(x):
        runs.append(torch.is_grad_enabled())
        return 2 * x

    x, weights = torch.randn(3, 4, requires_grad=True), [torch.randn(5, 4, requires_grad=True) for _ in range(3)]

    def forward(x):
        y = twice(x)
        return sum(F.linear(y, weight) for weight in weights)

    remake(forward)(x).sum().backward()
    assert runs == [True, False]
    for weight in weights:
        torch.testing.assert_close(weight.grad, (2 * x.detach()).sum(dim=0).expand(5, 4))
    torch.testing.assert_close(x.grad, 2 * sum(weight.detach().sum(dim=0) for weight in weights).expand(3, 4))


def test_a_result_that_the_block_returns_and_others_save_is_left_alone():
    """What leaves the stretch is alive anyway; outside of it nothing is forgotten."""
    double = cheap(lambda x: 2 * x)
    x = torch.randn(3, 4, requires_grad=True)
    out = remake(lambda x: double(x))(x)
    (out * out).sum().backward()
    torch.testing.assert_close(x.grad, 8 * x.detach())

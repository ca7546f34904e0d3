"""Weights rounded once a step (Linear.keep_rounded, parallelize): never those of another step."""

import pytest
import torch
from torch import nn

from mmcore.config import DistributedConfig
from mmcore.distributed.parallelize import parallelize
from mmcore.kernels.linear import reference
from mmcore.model.layers import Linear
from tests.helpers.models import tiny


def linear() -> Linear:
    layer = Linear(8, 4)
    nn.init.normal_(layer.weight)
    layer.keep_rounded(torch.bfloat16)
    return layer


def is_fresh(layer: Linear) -> bool:
    layer.keep_rounded(torch.bfloat16)
    return torch.equal(layer.rounded, layer.weight.to(torch.bfloat16))


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}, {}])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizers_step_is_seen(optimizer, form):
    layer = linear()
    before = layer.rounded.clone()
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer([layer.weight], lr=0.5, **form).step()
    assert is_fresh(layer) and not torch.equal(layer.rounded, before)


def test_loading_and_other_tensors_are_seen():
    layer = linear()
    layer.load_state_dict({"weight": torch.randn(4, 8)})
    assert is_fresh(layer)
    layer.weight.data = torch.randn(4, 8)
    assert is_fresh(layer)
    layer.weight = nn.Parameter(torch.randn(4, 8))
    assert is_fresh(layer)
    layer.keep_rounded(torch.float16)
    assert layer.rounded.dtype is torch.float16


def test_it_is_made_once_and_no_checkpoint_has_it():
    layer = linear()
    place = layer.rounded.data_ptr()
    layer.rounded.fill_(7)  # a mark: it stays while the weight does
    layer.keep_rounded(torch.bfloat16)
    assert (layer.rounded == 7).all() and layer.rounded.data_ptr() == place
    assert set(layer.state_dict()) == {"weight"}


@pytest.mark.parametrize("together", [False, True])
def test_products_take_the_rounded_weights_and_gradients_go_to_the_others(together, monkeypatch):
    """As on a GPU under autocast, in the functions that do it there."""
    monkeypatch.setattr(reference, "_product", lambda x, weight, rounded: reference.NarrowProduct.apply(x, weight, rounded))
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8).bfloat16().requires_grad_()
    weights = [torch.randn(rows, 8, requires_grad=True) for rows in (100, 3, 4, 70)]
    rounded = [weight.detach().bfloat16() for weight in weights]
    form = reference.thin_together if together else reference._each
    upstream = [torch.randn(2, 5, len(weight)).bfloat16() for weight in weights]

    def run(narrow):
        outs = form(x, weights, narrow)
        return outs, torch.autograd.grad(outs, [x, *weights], upstream)

    for ours, others in zip(run(rounded), run([None] * 4), strict=True):
        for a, b in zip(ours, others, strict=True):
            assert a.dtype is b.dtype and torch.equal(a, b)
    others = run([torch.zeros_like(narrow) for narrow in rounded])  # they, and nothing else, are what x meets
    assert all((out == 0).all() for out in others[0]) and (others[1][0] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(others[1][1:], run(rounded)[1][1:], strict=True))


@pytest.fixture
def cuda_autocast():
    """What torch.autocast("cuda") does, which refuses where there is no CUDA."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


def test_blocks_round_their_weights_under_a_gpus_autocast_alone(cuda_autocast):
    model = parallelize(tiny("memory_mosaics_v2", "auto"), DistributedConfig())
    tokens = torch.randint(0, model.config.vocab_size, (1, 8))
    layers = [module for module in model.model.layers.modules() if isinstance(module, Linear)]

    def loss() -> torch.Tensor:
        return model.loss(tokens, tokens, None, reduction="sum")

    torch.set_autocast_enabled("cuda", False)
    loss()
    assert layers and all(layer.rounded is None for layer in layers)
    torch.set_autocast_enabled("cuda", True)
    loss().backward()
    assert all(torch.equal(layer.rounded, layer.weight.bfloat16()) for layer in layers)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    assert not any(torch.equal(layer.rounded, layer.weight.bfloat16()) for layer in layers)
    loss()
    assert all(torch.equal(layer.rounded, layer.weight.bfloat16()) for layer in layers)

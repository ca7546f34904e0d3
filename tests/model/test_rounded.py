"""Weights rounded once a step (mmcore.distributed.rounding): they reach the products, and are never those of another step."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from mmcore.config import DistributedConfig
from mmcore.distributed.mesh import World
from mmcore.distributed.parallelize import parallelize
from mmcore.distributed.rounding import _kept, rounded
from mmcore.kernels.linear import linear, reference
from mmcore.model import layers
from mmcore.model.layers import Linear
from tests.helpers.models import random_tokens, tiny

HALF = torch.bfloat16
TOKENS = random_tokens(1, 8)


def is_fresh(weight: Tensor) -> bool:
    return torch.equal(rounded(weight, HALF), weight.to(HALF))


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}, {}])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizers_step_is_seen(optimizer, form):
    weight = nn.Parameter(torch.randn(4, 8))
    before = rounded(weight, HALF)
    weight.grad = torch.ones_like(weight)
    optimizer([weight], lr=0.5, **form).step()
    assert is_fresh(weight) and not torch.equal(rounded(weight, HALF), before)


def test_loading_and_other_tensors_are_seen():
    layer = Linear(8, 4)
    rounded(layer.weight, HALF)
    layer.load_state_dict({"weight": torch.randn(4, 8)})
    assert is_fresh(layer.weight)
    layer.weight.data = torch.randn(4, 8)
    assert is_fresh(layer.weight)
    for _ in range(20):  # the next one often lies where the last one lay
        layer.weight = nn.Parameter(torch.randn(4, 8))
        assert is_fresh(layer.weight)
    assert rounded(layer.weight, torch.float16).dtype is torch.float16


def test_it_is_made_once_a_step_and_goes_with_its_weight():
    weight = nn.Parameter(torch.randn(4, 8))
    first = rounded(weight, HALF)
    first.fill_(7)  # a mark: it stays while the weight does
    assert rounded(weight, HALF) is first and (first == 7).all()
    with torch.no_grad():
        weight.add_(1)
    assert rounded(weight, HALF) is not first and (first == 7).all(), "a graph of before may still want it"
    assert weight in _kept
    before = len(_kept)
    del weight
    assert len(_kept) == before - 1


@pytest.mark.parametrize("together", [False, True])
def test_products_take_the_rounded_weights_and_gradients_go_to_the_others(together, monkeypatch):
    """As on a GPU under autocast, in the functions that do it there."""
    monkeypatch.setattr(reference, "_product", lambda x, weight, rounded: reference.NarrowProduct.apply(x, weight, rounded))
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8).bfloat16().requires_grad_()
    weights = [torch.randn(rows, 8, requires_grad=True) for rows in (100, 3, 4, 70)]
    narrow = [weight.detach().bfloat16() for weight in weights]
    form = reference.thin_together if together else reference._each
    upstream = [torch.randn(2, 5, len(weight)).bfloat16() for weight in weights]

    def run(narrow):
        outs = form(x, weights, narrow)
        return outs, torch.autograd.grad(outs, [x, *weights], upstream)

    for ours, others in zip(run(narrow), run([None] * 4), strict=True):
        for a, b in zip(ours, others, strict=True):
            assert a.dtype is b.dtype and torch.equal(a, b)
    others = run([torch.zeros_like(part) for part in narrow])  # they, and nothing else, are what x meets
    assert all((out == 0).all() for out in others[0]) and (others[1][0] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(others[1][1:], run(narrow)[1][1:], strict=True))


def test_linear_gives_them_to_its_products(monkeypatch):
    given = []
    monkeypatch.setattr(reference, "_product", lambda x, weight, rounded: given.append(rounded) or x @ weight.T)
    x, weights = torch.randn(3, 8), [torch.randn(4, 8), torch.randn(2, 8)]
    narrow = [weight.bfloat16() for weight in weights]
    linear(x, weights, rounded=narrow, implementation="blocked")
    assert [part is own for part, own in zip(given, narrow, strict=True)] == [True, True]
    given.clear()
    linear(x, weights, implementation="blocked")
    assert given == [None, None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grad", [False, True])
def test_on_a_gpu_products_take_the_rounded_weight(grad):
    x, weight = torch.randn(2000, 64, device="cuda"), torch.randn(128, 64, device="cuda", requires_grad=True)
    other = torch.randn(128, 64, device="cuda", dtype=HALF)
    with torch.set_grad_enabled(grad), torch.autocast("cuda", HALF):
        (out,) = linear(x, [weight], rounded=[other])
    torch.testing.assert_close(out, x.to(HALF) @ other.T)


@pytest.fixture
def cuda_autocast():
    """What torch.autocast("cuda") does, which refuses where there is no CUDA."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", HALF)
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", before)


@pytest.fixture
def shown(monkeypatch) -> list:
    """What project gives its products as rounded weights, with the weights: lists of both."""
    found, own = [], layers.linear

    def spy(x, weights, scales=None, *, rounded=None, **options):
        found.append((weights, rounded))
        return own(x, weights, scales, rounded=rounded, **options)

    monkeypatch.setattr(layers, "linear", spy)
    return found


def loss(model) -> Tensor:
    return model.loss(TOKENS, TOKENS, None, reduction="sum")


def all_fresh(shown: list) -> bool:
    products = [parts for parts in shown if parts[0][0].shape[0] != 61]  # but the classifier's
    return bool(products) and all(
        rounded is not None and all(torch.equal(a.to(HALF), b) for a, b in zip(weights, rounded, strict=True))
        for weights, rounded in products
    )


@pytest.mark.parametrize("kind", ["memory_mosaics_v2", "llama", "long_short_transformer"])
def test_blocks_show_them_to_their_products_and_to_nobody_else(kind, cuda_autocast, shown):
    model = parallelize(tiny(kind), DistributedConfig())
    for _ in range(3):
        shown.clear()
        loss(model).backward()
        assert all_fresh(shown)
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    assert not list(model.buffers()) and set(model.state_dict()) == set(tiny(kind).state_dict())
    shown.clear()
    with torch.no_grad():  # weights may be others for a while
        loss(model)
    model.advance(TOKENS, model.new_state())
    torch.set_autocast_enabled("cuda", False)
    loss(model)
    assert shown and all(rounded is None for _, rounded in shown)


def test_a_pass_that_fails_leaves_nothing_behind(cuda_autocast, monkeypatch):
    model = parallelize(tiny(), DistributedConfig())
    monkeypatch.setattr(type(model.model.layers[0].persistent), "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss(model)
    assert not list(model.buffers())


def test_copies_have_their_own(cuda_autocast, shown):
    model = parallelize(tiny(), DistributedConfig())
    loss(model)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        shown.clear()
        assert loss(twin) > 0 and all_fresh(shown)


def test_several_ranks_and_full_checkpointing_have_none(cuda_autocast, shown, monkeypatch):
    monkeypatch.setattr("mmcore.distributed.parallelize.shard", lambda *_: None)
    for model in (
        parallelize(tiny(), DistributedConfig(), world=World(size=2)),
        parallelize(tiny(), DistributedConfig(activation_checkpointing="full")),
    ):
        shown.clear()
        loss(model).backward()
        assert shown and all(rounded is None for _, rounded in shown)


@pytest.mark.slow
def test_compiled_blocks_spare_with_selective_checkpointing():
    """SwiGLU's product, which a product of the backward pass reads, is not kept; results are the same."""

    def kept(checkpointing: str) -> tuple[int, list[Tensor]]:
        model = parallelize(tiny(kernels="reference"), DistributedConfig(activation_checkpointing=checkpointing), True)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss(model)
        value.backward()
        return sum(sizes.values()), [value.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    (most, plain), (least, sparing) = kept("none"), kept("selective")
    inner = TOKENS.numel() * tiny().config.intermediate_size * tiny().config.num_hidden_layers
    assert least <= most - 4 * inner
    for a, b in zip(plain, sparing, strict=True):
        torch.testing.assert_close(a, b)

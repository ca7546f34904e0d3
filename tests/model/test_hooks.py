"""What users hang on a model or put in a layer's place is seen by forward passes and decoding alike."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mmcore.distributed.rounding import round_once_a_step
from mmcore.model.language_model import _loss
from mmcore.model.layers import Linear
from tests.helpers.models import random_tokens, tiny

TYPES = ["memory_mosaics_v2", "llama", "long_short_transformer"]


class Adapter(nn.Module):
    """A projection with a low-rank addition, as LoRA has."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(torch.randn(4, base.in_features, generator=generator) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) / 8)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def stepping(model):
    """The compiled step of a new state, or False."""
    state = model.new_state(1)
    model.advance(random_tokens(1, 2), state)
    return state.whole_step


def both_ways(model, tokens):
    """Logits [B, T, V] of one forward pass, and of single tokens after a piece."""
    with torch.no_grad():
        whole = model(tokens)
    state = model.new_state(len(tokens))
    pieces = [model.advance(piece, state, last_only=False) for piece in tokens.split([3] + [1] * 9, dim=1)]
    return whole, torch.cat(pieces, 1)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0", "memory", "projection", "model.norm", "lm_head"])
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_act_on_forward_passes_and_on_decoding(model_type, name, kind):
    """Each moves what goes in or out; what it hangs on is called with it."""
    model, tokens = tiny(model_type), random_tokens(2, 12)
    plain = both_ways(model, tokens)[0]
    memory = "self_attn" if model_type == "llama" else "long_term"
    inner = {"llama": "q_proj", "long_short_transformer": "q_proj"}.get(model_type, "key_proj")
    name = {"memory": f"model.layers.1.{memory}", "projection": f"model.layers.1.{memory}.{inner}"}.get(name, name)
    module = model.get_submodule(name)
    if kind == "post":
        handle = module.register_forward_hook(lambda module, given, result: result + torch.linspace(-1, 1, result.shape[-1]))
    elif name == "model.embed_tokens":
        handle = module.register_forward_pre_hook(lambda module, given: ((given[0] + 1) % 61,))
    else:
        handle = module.register_forward_pre_hook(
            lambda module, given, named: ((given[0] + torch.linspace(-1, 1, given[0].shape[-1]), *given[1:]), named),
            with_kwargs=True,
        )
    whole, pieces = both_ways(model, tokens)
    assert torch.allclose(whole, pieces, atol=3e-5)
    if name != "model.norm" or kind == "pre":
        assert (whole - plain).abs().max() > 1e-3
    handle.remove()
    assert torch.allclose(both_ways(model, tokens)[1], plain, atol=3e-5)


@pytest.mark.parametrize("names", [
    ["long_term.key_proj", "short_term.value_proj"], ["out_proj"], ["persistent.gate_proj", "persistent.down_proj"],
])  # fmt: skip
def test_adapters_in_the_place_of_projections(names):
    model, tokens = tiny(), random_tokens(2, 12)
    plain = both_ways(model, tokens)[0]
    for name in names:
        owner, leaf = name.rsplit(".", 1) if "." in name else ("", name)
        block = model.model.layers[0].get_submodule(owner)
        setattr(block, leaf, Adapter(getattr(block, leaf)))
    whole, pieces = both_ways(model, tokens)
    assert torch.allclose(whole, pieces, atol=3e-5) and (whole - plain).abs().max() > 1e-3


class Wrapped(nn.Module):
    """An adapter that shows nothing of what it is put around."""

    def __init__(self, base):
        super().__init__()
        self.inner = Adapter(base)

    def forward(self, x):
        return self.inner(x)


def with_bias(layer):
    layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features))
    return layer


def doubled(layer):
    layer.forward = lambda x, before=layer.forward: 2 * before(x)
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, given, result: 2 * result)
    return layer


def other(layer):
    torch.manual_seed(0)
    return nn.Linear(layer.in_features, layer.out_features)


def other_of_ours(layer):
    fresh = Linear(layer.in_features, layer.out_features)
    fresh.load_state_dict(other(layer).state_dict(), strict=False)
    return fresh


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("change", [Adapter, Wrapped, with_bias, doubled, hooked, other, other_of_ours])
def test_a_changed_classifier_is_the_one_of_the_loss_too(model_type, change):
    model, tokens = tiny(model_type), random_tokens(2, 12)
    before = both_ways(model, tokens)[0]
    model.lm_head = change(model.lm_head)
    whole, pieces = both_ways(model, tokens)
    assert torch.allclose(whole, pieces, atol=3e-5) and (whole - before).abs().max() > 1e-2
    labels = tokens.roll(-1, 1)
    labels[0, 3] = -100
    for reduction in ("none", "sum", "mean"):
        want = nn.functional.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction=reduction)
        found = model.loss(tokens, labels, reduction=reduction)
        assert torch.allclose(found, want.view(found.shape), rtol=1e-4)
    model.loss(tokens, labels).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.lm_head.parameters())


def test_a_classifiers_own_loss_adds_its_bias():
    """Sharding calls it without asking what else the classifier is."""
    head, labels, hidden = with_bias(tiny().lm_head), random_tokens(10), torch.randn(10, 32)
    assert torch.allclose(head.loss(hidden, labels, "mean"), nn.functional.cross_entropy(head(hidden), labels))


def test_a_replaced_layer_and_a_hook_anywhere_end_the_compiled_step():
    model, tokens = tiny(), random_tokens(2, 20)
    state = model.new_state(2)
    model.advance(tokens, state)
    model.model.layers[0] = nn.Sequential()
    nn.Linear(1, 1).register_forward_hook(lambda *_: None)
    assert model._step_of(state) is False


@pytest.mark.parametrize("change", [lambda layer: layer, with_bias])
def test_a_traced_loss_sees_what_the_classifier_has_become(change):
    head, labels, hidden = change(tiny().lm_head), random_tokens(10), torch.randn(10, 32)
    want = nn.functional.cross_entropy(head(hidden), labels)
    assert torch.allclose(torch.compile(_loss, backend="eager", fullgraph=True)(head, hidden, labels, "mean"), want)


@pytest.mark.parametrize("model_type, name", [
    ("memory_mosaics_v2", "long_term.value_proj"), ("memory_mosaics_v2", "out_proj"), ("memory_mosaics_v2", "persistent.up_proj"),
    ("llama", "self_attn.k_proj"),
])  # fmt: skip
@pytest.mark.parametrize("change", [with_bias, doubled])
def test_a_projection_with_a_bias_or_a_forward_of_its_own(model_type, name, change):
    """Of few rows, whose products are made one by one, and of many."""
    model, tokens = tiny(model_type), random_tokens(2, 30)
    replaced = tiny(model_type)
    change(model.model.layers[0].get_submodule(name))
    owner, _, leaf = name.rpartition(".")
    layer = replaced.model.layers[0].get_submodule(name)
    same = nn.Linear(layer.in_features, layer.out_features)
    factor, bias = (1, torch.linspace(-1, 1, layer.out_features)) if change is with_bias else (2, torch.zeros(layer.out_features))
    same.weight.data, same.bias.data = factor * layer.weight.data, bias
    setattr(replaced.model.layers[0].get_submodule(owner), leaf, same)
    whole, pieces = both_ways(model, tokens[:, :12])
    assert torch.allclose(whole, pieces, atol=3e-5)
    with torch.no_grad():
        assert torch.allclose(model(tokens), replaced(tokens), atol=3e-5)


class Scaled(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) * 3


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.norm", "model.layers.1.memory_norm", "model.layers.0.persistent"])
@pytest.mark.parametrize("how", ["class", "instance"])
def test_whatever_takes_the_place_of_a_part_is_called(name, how):
    model, tokens = tiny(), random_tokens(2, 12)
    plain = both_ways(model, tokens)[0]
    part = model.get_submodule(name)
    if how == "instance":
        part.forward = lambda x, before=part.forward: before(x) * 3
    elif isinstance(part, nn.Embedding):
        part.__class__ = Scaled
    else:
        part.__class__ = type("Other", (type(part),), {"forward": lambda self, x: super(type(self), self).forward(x) * 3})
    whole, pieces = both_ways(model, tokens)
    assert torch.allclose(whole, pieces, atol=1e-4) and (whole - plain).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", TYPES)
def test_second_derivatives_of_a_model_are_refused_in_words(model_type):
    """Gradients may be asked for so that they could be differentiated; only differentiating them is refused."""
    model, tokens = tiny(model_type), random_tokens(2, 12)
    parameters = list(model.parameters())
    want = torch.autograd.grad(model.loss(tokens, tokens), parameters, allow_unused=True)
    found = torch.autograd.grad(model.loss(tokens, tokens), parameters, create_graph=True, allow_unused=True)
    for a, b in zip(want, found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    with pytest.raises(RuntimeError, match="no second derivatives: start Python with MM_KERNELS=reference"):
        sum(gradient.square().sum() for gradient in found if gradient is not None).backward()


def test_pruned_weights_are_made_anew_in_every_pass():
    model, tokens = tiny(), random_tokens(2, 12)
    layer = model.model.layers[0].short_term.key_proj
    prune.random_unstructured(layer, "weight", amount=0.5)
    before = both_ways(model, tokens)
    with torch.no_grad():
        layer.weight_orig[:5] = 0
    after = both_ways(model, tokens)
    assert torch.allclose(*before, atol=3e-5) and torch.allclose(*after, atol=3e-5)
    assert (before[0] - after[0]).abs().max() > 1e-3


@pytest.mark.parametrize("training_only", [True, False])
def test_the_compiled_step_gives_way_to_hooks_but_for_those_of_training(training_only):
    model, tokens, seen = tiny(), random_tokens(1, 4), []
    plain = model.new_state(1)
    model.advance(tokens, plain)
    round_once_a_step(model.model.layers[0])
    if not training_only:
        model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    state = model.new_state(1)
    model.advance(tokens, state)
    assert bool(state.whole_step) is (bool(plain.whole_step) and training_only) and bool(seen) is not training_only


@pytest.mark.parametrize("name", ["model.layers.0", "model.layers.1.long_term.key_proj", "lm_head"])
@pytest.mark.parametrize("how", ["next", "piece", "copy"])
def test_a_hook_is_called_by_a_state_that_has_begun(name, how):
    model, tokens, seen = tiny(), random_tokens(1, 24), []
    state = model.new_state(1)
    first = [model.advance(piece, state, last_only=False) for piece in tokens[:, :12].split([10, 1, 1], 1)]
    torch.zeros(1, requires_grad=True).register_hook(print)  # of something else
    first.append(model.advance(tokens[:, 12:13], state, last_only=False))
    assert bool(state.whole_step) is bool(stepping(model))
    handle = model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    if how == "copy":
        state = copy.deepcopy(state)
    sizes = [11] if how == "piece" else [1] * 11
    first += [model.advance(piece, state, last_only=False) for piece in tokens[:, 13:].split(sizes, 1)]
    assert len(seen) == len(sizes) and not state.whole_step
    handle.remove()
    with torch.no_grad():
        assert torch.allclose(torch.cat(first, 1), model(tokens), atol=3e-5)


def test_a_branch_calls_hooks_that_its_source_has_not_met():
    model, tokens, seen = tiny(), random_tokens(1, 12), []
    state, rows = model.new_state(1), model.new_state(2)
    model.advance(tokens, state)
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    rows.branch(state, 2)
    model.advance(random_tokens(2, 1), rows)
    assert seen == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_int8_stay_as_they_are(dtype):
    """Of 40 tokens the products in C; a scale in two bytes was read as four, and beyond its end."""
    model, tokens = tiny().quantize(), random_tokens(2, 40)
    scale = model.lm_head.scale.clone()
    with torch.no_grad():
        before = model(tokens)
        after = model.to(dtype)(tokens)
    assert torch.equal(model.lm_head.scale, scale)
    assert (after - before).abs().mean() < 0.02 * before.abs().mean()  # the embedding and the norms are rounded


@pytest.mark.parametrize("quantized", [True, False])
def test_an_embedding_in_float64(quantized):
    model, tokens = tiny(), random_tokens(2, 12)
    model = model.quantize() if quantized else model
    plain = both_ways(model, tokens)[1]
    model.model.embed_tokens.double()
    state = model.new_state(2)
    found = [model.advance(piece, state, last_only=False) for piece in tokens.split([3] + [1] * 9, dim=1)]
    assert torch.allclose(torch.cat(found, 1).float(), plain, atol=1e-3)


def test_a_state_keeps_the_weights_it_began_with():
    """A step has their addresses: memory that a parameter has left must not be anybody else's meanwhile."""
    model, tokens = tiny(), random_tokens(1, 12)
    want = both_ways(model, tokens)[1]
    state = model.new_state(1)
    found = [model.advance(tokens[:, :3], state, last_only=False)]
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, float("nan"))
    others = [torch.full_like(parameter, float("nan")) for parameter in model.parameters() for _ in range(3)]
    found += [model.advance(tokens[:, t : t + 1], state, last_only=False) for t in range(3, 12)]
    if state.whole_step:
        assert torch.equal(torch.cat(found, 1), want) and others

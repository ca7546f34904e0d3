"""Models of which some matrices are kept in int8, and models that are quantized again."""

import pytest
import torch
from torch import nn

from mmcore.model.layers import Linear
from tests.helpers.models import random_tokens, tiny


def in_part(*names, model_type="memory_mosaics_v2"):
    """A model with these matrices of every layer in int8, and one in fp32 with the very same weights."""
    model, exact = tiny(model_type), tiny(model_type)
    for depth, layer in enumerate(model.model.layers):
        for name in names:
            layer.get_submodule(name).quantize()
            exact.model.layers[depth].get_submodule(name).weight.data.copy_(layer.get_submodule(name).exact_weight())
    return model, exact


@pytest.mark.parametrize("names", [
    ["persistent.up_proj"], ["persistent.gate_proj"], ["long_term.value_proj", "persistent.down_proj"],
    ["short_term.key_proj"], ["short_term.key_proj", "short_term.value_proj", "long_term.key_proj", "long_term.value_proj"],
], ids=range(5))  # fmt: skip
@pytest.mark.parametrize("sizes", [[40], [20] + [1] * 20])
def test_some_matrices_in_int8_and_others_not(names, sizes):
    """Of many rows, whose products are made together, and of few."""
    model, exact = in_part(*names)
    tokens = random_tokens(3, 40)
    state = model.new_state(3)
    with torch.no_grad():
        want, whole = exact(tokens), model(tokens)
    pieces = torch.cat([model.advance(piece, state, last_only=False) for piece in tokens.split(sizes, 1)], 1)
    for found in (whole, pieces):
        assert (found - want).abs().max() < 2e-3 * want.abs().max()  # x may be rounded to meet int8


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.gate_proj"])
def test_a_llama_in_part(name):
    model, exact = in_part(name, model_type="llama")
    tokens = random_tokens(3, 40)
    with torch.no_grad():
        want = exact(tokens)
        assert (model(tokens) - want).abs().max() < 2e-3 * want.abs().max()


@pytest.mark.parametrize("change", [Linear.quantize, lambda layer: setattr(layer, "forward", nn.Linear(32, 32).forward)])
@pytest.mark.parametrize("grad", [True, False])
def test_under_autocast_all_that_is_read_together_has_one_dtype(change, grad):
    """A product in int8 or of the library's is in autocast's dtype there, others may be in fp32."""
    model, tokens = tiny(), random_tokens(2, 40)
    change(model.model.layers[0].long_term.value_proj)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        assert model.loss(tokens, tokens).isfinite()


def test_quantizing_again_changes_nothing():
    model, tokens = tiny().quantize(), random_tokens(2, 40)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        before, after = model(tokens), model.quantize()(tokens)
    assert torch.equal(before, after)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())

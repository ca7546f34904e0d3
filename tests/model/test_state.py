"""Copies of a state, and what it hands out: neither knows what becomes of the state."""

import copy
import gc

import pytest
import torch

from mmcore.config import ModelConfig, V1Config
from mmcore.model import build_model
from tests.helpers.models import random_tokens, tiny

SETTINGS = {
    "compiled": {}, "layers": {"kernels": "blocked", "num_hidden_layers": 1}, "llama": {"model_type": "llama"},
    "long_short": {"model_type": "long_short_transformer"},
}
LENGTH, CUT = 45, 20


def model_of(kind):
    if kind != "v1":
        return tiny(**SETTINGS[kind])
    config = ModelConfig(model_type="memory_mosaics_v1", v1=V1Config(), vocab_size=61, hidden_size=32, intermediate_size=48,
                         num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    model = build_model(config)
    model.init_weights(0)
    return model.eval()


@pytest.fixture(params=[*SETTINGS, "v1"])
def begun(request):
    """A model, a text of two rows, its logits [B, T, V], and a state that has read the first CUT tokens."""
    model, tokens = model_of(request.param), random_tokens(2, LENGTH)
    state = model.new_state(2)
    model.advance(tokens[:, : CUT - 1], state)
    model.advance(tokens[:, CUT - 1 : CUT], state)
    with torch.no_grad():
        return model, tokens, model(tokens), state


def go_on(model, state, tokens):
    return torch.cat([model.advance(token, state, last_only=False) for token in tokens[:, CUT:].split(1, 1)], 1)


def test_a_deep_copy_goes_on_by_itself(begun):
    model, tokens, whole, state = begun
    other = copy.deepcopy(state)
    go_on(model, state, random_tokens(2, LENGTH, seed=1))  # another text, past the room of the windows
    third = copy.deepcopy(other)
    del state, begun
    gc.collect()
    for one in (other, third):
        assert one.length == CUT and all(memory.owner is one for memory in one.memories.values())
        assert torch.allclose(go_on(model, one, tokens), whole[:, CUT:], atol=3e-5)
    assert bool(other.whole_step) is bool(third.whole_step)


def test_a_deep_copy_of_padded_rows_and_of_a_mark(begun):
    model, tokens, whole, _ = begun
    state = model.new_state(2, padding=torch.tensor([0, 7]))
    model.advance(torch.cat([tokens[:1, :CUT], torch.nn.functional.pad(tokens[1:, : CUT - 7], (7, 0))]), state)
    other, mark = copy.deepcopy((state, state.mark()))
    state.padding.fill_(3)
    shifted = torch.stack([tokens[0], torch.nn.functional.pad(tokens[1, : LENGTH - 7], (7, 0))])
    for _ in range(2):
        found = go_on(model, other, shifted)
        assert torch.allclose(found[0], whole[0, CUT:], atol=3e-5)
        assert torch.allclose(found[1], whole[1, CUT - 7 : LENGTH - 7], atol=3e-5)
        other.rewind(mark)


def test_a_copy_of_what_has_read_nothing_and_of_a_branch():
    model, tokens = tiny(), random_tokens(1, LENGTH)
    empty = model.new_state(1)
    source, other = copy.deepcopy(empty), copy.deepcopy(empty)
    model.advance(tokens[:, :CUT], source)
    rows = model.new_state(3)
    rows.branch(source, 4, [name for name in rows.memories if "long" in name])
    copied = copy.deepcopy(rows)
    more = random_tokens(3, 4, seed=2)
    assert torch.equal(*(model.advance(more, one) for one in (rows, copied)))
    assert other.length == 0
    with torch.no_grad():
        assert torch.allclose(model.advance(tokens, other), model(tokens)[:, -1], atol=3e-5)


def test_a_shallow_copy_is_refused():
    with pytest.raises(TypeError, match="take copy.deepcopy"):
        copy.copy(tiny().new_state(1))


def test_what_a_state_hands_out_stays_as_it_was(begun):
    """Through every move of a window's pairs, and where the next ones begin in the same buffer."""
    model, tokens, whole, state = begun
    saved = state.tensors()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    size = state.bytes
    go_on(model, state, random_tokens(2, 2 * LENGTH, seed=1))
    assert size == sum(tensor.nbytes for tensor in saved.values()) < state.bytes
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.items())
    other = model.new_state(2)
    other.load(saved)
    assert torch.allclose(go_on(model, other, tokens), whole[:, CUT:], atol=3e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.items())

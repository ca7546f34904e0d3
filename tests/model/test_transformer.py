"""The Llama baseline against Hugging Face's implementation, with every option it supports."""

import pytest
import torch

from mmcore.config import model_config_from_json
from mmcore.model import build_model
from tests.helpers.models import random_tokens, tiny

transformers = pytest.importorskip("transformers")

OPTIONS = {
    "plain": {},
    "grouped_heads": {"num_key_value_heads": 2},
    "one_kv_head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "own_head_size": {"head_dim": 16},
    "other_theta": {"rope_theta": 500_000.0},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3_rope": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
}


def pair(**options):
    """Hugging Face's model and ours with the same random weights."""
    torch.manual_seed(0)
    settings = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=128, rms_norm_eps=1e-5, attn_implementation="eager",
                    initializer_range=0.3)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | options))).eval()
    ours = build_model(model_config_from_json(theirs.config.to_dict() | {"model_type": "llama"}))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours.eval()


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_gradients_equal_hugging_face(name):
    theirs, ours = pair(**OPTIONS[name])
    tokens = random_tokens(2, 47)
    expected, got = theirs(tokens).logits, ours(tokens)
    assert (expected - got).abs().max() < 1e-4 * expected.abs().max()
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * direction).sum().backward()
    (got * direction).sum().backward()
    gradients = dict(ours.named_parameters())
    for parameter_name, parameter in theirs.named_parameters():
        reference = parameter.grad
        assert (gradients[parameter_name].grad - reference).norm() < 1e-4 * reference.norm(), parameter_name


def test_decoding_with_grouped_heads_equals_hugging_face():
    theirs, ours = pair(num_key_value_heads=2)
    tokens = random_tokens(2, 30)
    state = ours.new_state(2)
    got = torch.cat([ours.advance(piece, state, last_only=False) for piece in tokens.split([13] + [1] * 17, 1)], 1)
    assert (got - theirs(tokens).logits).abs().max() < 1e-4


def test_long_short_attention_with_full_reach_is_two_attentions():
    """With a window past the text and no delay both memories are ordinary causal attention, as in a Llama."""
    model = tiny("long_short_transformer", short_term_window=1000, kernels="reference").double()
    block = model.model.layers[0]
    y = torch.randn(1, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    from mmcore.model.documents import packing
    for memory in (block.short_term, block.long_term):
        q, k, v = (proj(y).view(1, 20, 4, 8).transpose(1, 2) for proj in (memory.q_proj, memory.k_proj, memory.v_proj))
        angles = torch.arange(20.0)[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
        cos, sin = torch.cat([angles.cos()] * 2, -1).double(), torch.cat([angles.sin()] * 2, -1).double()
        q, k = (x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin for x in (q, k))
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        got = memory(y, packing(None), 0)
        assert torch.allclose(got, expected.transpose(1, 2).flatten(2), atol=1e-6)

"""What is applied from outside leaves names and gradients as they are."""

import pytest
import torch

from mmcore.config import DistributedConfig, ModelConfig
from mmcore.distributed.parallelize import parallelize
from mmcore.errors import ConfigError
from mmcore.model import build_model


def build(kind):
    config = ModelConfig(
        model_type=kind, vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        short_term_window=8, long_term_delay=3, long_term_delay_range=(3, 8), max_position_embeddings=32,
    )  # fmt: skip
    model = build_model(config)
    model.init_weights(0)
    return model


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kind", ["memory_mosaics_v2", "llama", "long_short_transformer"])
def test_recomputation_gives_the_same_gradients_under_the_same_names(kind, mode):
    plain = build(kind)
    names = [name for name, _ in plain.named_parameters()]
    recomputed = parallelize(build(kind), DistributedConfig(activation_checkpointing=mode))
    assert [name for name, _ in recomputed.named_parameters()] == names
    tokens = torch.randint(0, 40, (2, 30), generator=torch.Generator().manual_seed(0))
    for model in (plain, recomputed):
        model.loss(tokens, tokens, delay=5).backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_block_keeps_its_input_alone():
    def saved(model):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            model.loss(torch.zeros(2, 32, dtype=torch.long), torch.zeros(2, 32, dtype=torch.long), delay=5)
        return sum(held)

    plain, recomputed = build("memory_mosaics_v2"), build("memory_mosaics_v2")
    parallelize(recomputed, DistributedConfig(activation_checkpointing="full"))
    assert saved(recomputed) < saved(plain) / 3


def test_one_process_has_nothing_to_offload():
    with pytest.raises(ConfigError, match="cpu_offload moves the shares of several ranks to host memory, and this is one"):
        parallelize(build("llama"), DistributedConfig(cpu_offload=True))


@pytest.mark.parametrize(("values", "words"), [
    ({"sharding": "zero"}, "distributed.sharding is 'zero': choose full or hybrid"),
    ({"activation_checkpointing": "some"}, "choose none, selective or full"),
    ({"gradient_reduction": "never"}, "choose step or micro_batch"),
    ({"shard_size": 4}, "shard_size is for hybrid sharding: set distributed.sharding=hybrid"),
    ({"sharding": "hybrid", "shard_size": 0}, "it must be at least 1"),
    ({"timeout_seconds": 0.0}, "it must be positive"),
])
def test_settings_that_make_no_sense(values, words):
    with pytest.raises(ConfigError, match=words):
        DistributedConfig(**values)

"""The cost formulas against the paper's figures, against loops, against the built models and torch's FLOP counter."""

import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmcore.config import ARCHITECTURES, DistributedConfig, ModelConfig, V1Config
from mmcore.distributed.parallelize import parallelize
from mmcore.kernels.linear import cpu
from mmcore.kernels.loss_chunks import chunk_rows
from mmcore.model import accounting, build_model

LARGE = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
SMALL = {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
TINY = {
    "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "short_term_window": 9, "long_term_delay": 5, "long_term_delay_range": (5, 8),
}


def _name(config):
    banks = f"-{config.v1.persistent_banks}" if config.v1 else ""
    ablated = "" if config.gated_keys else "-no-gates"
    return f"{config.model_type}{ablated}-{'tied' if config.tie_word_embeddings else 'untied'}-{config.kv_heads}{banks}"


def tiny_variants():
    for model_type, tied in itertools.product(ARCHITECTURES, (False, True)):
        yield ModelConfig(model_type=model_type, tie_word_embeddings=tied, **TINY)
    yield ModelConfig(gated_keys=False, **TINY)
    yield ModelConfig(model_type="llama", num_key_value_heads=2, head_dim=8, **TINY)
    yield ModelConfig(model_type="memory_mosaics_v1", v1=V1Config(bias=True, persistent_banks=3), **TINY)
    yield ModelConfig(model_type="memory_mosaics_v1", v1=V1Config(persistent_banks=0, key_taps=2, value_taps=3), **TINY)


def test_paper_sizes():
    large, small = ModelConfig(**LARGE), ModelConfig(**SMALL)
    assert round(accounting.parameters(large)["total"] / 1e9, 1) == 9.9
    assert round(accounting.parameters(large)["without_long_term"] / 1e9, 1) == 8.3
    assert round(accounting.parameters(ModelConfig(model_type="llama", **LARGE))["total"] / 1e9, 1) == 8.8
    assert round(accounting.parameters(small)["total"] / 1e9, 1) == 2.0
    assert round(accounting.parameters(small)["blocks"] / 1e9, 1) == 1.5


def test_paper_flops():
    """The paper prints 18.9, 15.6 and 16.7 B a token."""
    large = ModelConfig(**LARGE)
    assert accounting.flops_per_token(large) == pytest.approx(18.9e9, rel=0.01)
    assert accounting.flops_per_token(large, without=("long_term",)) == pytest.approx(15.6e9, rel=0.01)
    assert accounting.flops_per_token(ModelConfig(model_type="llama", **LARGE)) == pytest.approx(16.7e9, rel=0.01)


@pytest.mark.parametrize("config", tiny_variants(), ids=_name)
def test_parameters_equal_the_built_model(config):
    with torch.device("meta"):
        model = build_model(config)
    counted = accounting.parameters(config)
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    assert counted["blocks"] == sum(p.numel() for p in model.model.layers.parameters())
    assert counted["total"] == sum(counted["by_part"].values())
    assert counted["total"] == counted["embedding"] + counted["blocks"] + counted["final_norm"]
    gone = sum(p.numel() for name, p in model.named_parameters() if ".long_term." in name)
    if config.model_type in ("memory_mosaics_v2", "long_short_transformer"):
        gone += sum(layer.out_proj.weight.numel() // 2 for layer in model.model.layers)
    assert counted["without_long_term"] == counted["total"] - gone


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("scale", [LARGE, SMALL], ids=["8b", "1.5b"])
def test_parameters_equal_the_built_model_at_paper_size(model_type, scale):
    config = ModelConfig(model_type=model_type, **scale)
    with torch.device("meta"):
        model = build_model(config)
    assert accounting.parameters(config)["total"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("config", tiny_variants(), ids=_name)
def test_forward_flops_equal_torchs_counter(config):
    """The reference implementation multiplies whole T x T matrices, which is the formula's dense form."""
    batch, length = 2, 21
    model = build_model(config, kernels="reference")
    model.init_weights(seed=0)
    tokens = torch.randint(config.vocab_size, (batch, length))
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    formula = accounting.flops_per_token(config) + accounting.read_flops_per_token(config, length, dense=True)
    assert counter.get_total_flops() == batch * length * formula


@pytest.mark.parametrize("model_type", ["memory_mosaics_v2", "llama"])
def test_training_flops_are_three_times_forward(model_type):
    """Backward takes two products for each of the forward's, but for the embedding's look-up, which takes none."""
    config = ModelConfig(model_type=model_type, **TINY)
    model = build_model(config, kernels="reference")
    model.init_weights(seed=0)
    tokens = torch.randint(config.vocab_size, (2, 21))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    forward = accounting.flops_per_token(config) + accounting.read_flops_per_token(config, 21, dense=True)
    assert counter.get_total_flops() == pytest.approx(3 * 2 * 21 * forward, rel=1e-6)


@pytest.mark.parametrize("context", [1, 2, 5, 8, 9, 10, 40])
@pytest.mark.parametrize("config", [ModelConfig(model_type=kind, **TINY) for kind in ARCHITECTURES], ids=ARCHITECTURES)
def test_pairs_equal_a_count(config, context):
    """Pairs counted one by one from the definitions of the windows, t from 1."""
    h, counted = config.short_term_window, {}
    times = range(1, context + 1)
    if config.model_type == "llama":
        counted["attention"] = sum(len([i for i in times if i <= t]) for t in times)
    elif config.v1:
        counted["contextual"] = sum(len([i for i in times if i <= t - 1]) for t in times)
    else:
        newest = 0 if config.model_type == "long_short_transformer" else 1
        counted["short_term"] = sum(len([i for i in times if t - h + 1 <= i <= t - newest]) for t in times)
        counted["long_term"] = sum(len([i for i in times if i <= t - m]) for t in times for m in (5, 6, 7, 8)) / 4
    found = accounting.pairs_per_query(config, context)
    assert found == pytest.approx({name: value / context for name, value in counted.items()})


def test_training_flops_use_the_mean_of_the_drawn_delays():
    config = ModelConfig(**TINY)
    drawn = [accounting.read_flops_per_token(config, 40, delay=m) for m in (5, 6, 7, 8)]
    expected = 3 * (accounting.flops_per_token(config) + sum(drawn) / 4)
    assert accounting.training_flops_per_token(config, 40) == pytest.approx(expected)


class Storages(TorchDispatchMode):
    """Every storage that appears among results, without keeping it alive."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted, self.seen = wanted, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and self.wanted(tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.seen[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
        return out

    def alive(self):
        return sum(size for reference, size in self.seen.values() if not reference.expired())


def kept_bytes(config, batch, length, half, checkpointing="none"):
    """Bytes of activations that live on after a forward pass, weights and their bf16 copies left out."""
    # A GPU runs the block-wise kernels; under bf16 they stand for it here, but where a CPU's own products are meant.
    model = build_model(config, kernels="blocked" if half and not cpu.multiplies_bf16() else "auto")
    model.init_weights(seed=0)
    parallelize(model, DistributedConfig(activation_checkpointing=checkpointing))
    rows = (batch, batch * length)  # a weight's copy has its own shape
    tokens = torch.randint(config.vocab_size, (batch, length))
    storages = Storages(lambda tensor: tensor.numel() >= batch * length and tensor.shape[0] in rows)
    with storages, torch.autocast("cpu", enabled=half):
        out = model.hidden(tokens)
    assert out.requires_grad
    return storages.alive()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocabulary", [100, 8192, 32_768, 128_256, 262_144, 10**6])
def test_the_loss_holds_as_many_rows_as_the_plan_counts(vocabulary, device):
    config = ModelConfig(**TINY | {"vocab_size": vocabulary})
    counted = [accounting.loss_bytes(config, tokens, 4, device == "cpu") - 4 * config.hidden_size * (tokens + vocabulary)
               for tokens in (50, 10**7)]  # fmt: skip
    assert counted == [4 * vocabulary * rows for rows in (50, chunk_rows(vocabulary, device))]


TRAINED = [(kind, how) for kind in ARCHITECTURES for how in ("none", "selective", "full")
           if kind != "memory_mosaics_v1" or how == "none"]  # nobody trains v1 at a size that needs checkpointing


BYTES = {"fp32": (4, 4), "bf16": (2, 2), "bf16 on a CPU": (4, 2)}


@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("model_type, checkpointing", TRAINED)
def test_activations_equal_what_autograd_keeps(model_type, precision, checkpointing, monkeypatch):
    """The difference of two depths is one block."""
    half, on_a_cpu = precision != "fp32", precision == "bf16 on a CPU"
    if on_a_cpu and not cpu.multiplies_bf16():
        pytest.skip("this processor has no products of bf16")
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: on_a_cpu)
    shape = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2}
    configs = [ModelConfig(model_type=model_type, num_hidden_layers=layers, **shape) for layers in (1, 2)]
    one, two = (kept_bytes(config, 2, 300, half, checkpointing) for config in configs)
    compute, inner = BYTES[precision]
    formula = [accounting.activation_bytes(config, 600, compute, checkpointing, inner) for config in configs]
    assert formula[1] - formula[0] == pytest.approx(two - one, rel=0.1)


@pytest.mark.parametrize("v1", [V1Config(), V1Config(persistent_banks=0, value_shift=3), V1Config(key_taps=3, value_taps=2, value_shift=2)])
def test_the_state_of_a_v1_mosaic_has_the_bytes_of_the_formula(v1):
    config = ModelConfig(model_type="memory_mosaics_v1", v1=v1, **TINY)
    model = build_model(config)
    model.init_weights(0)
    state = model.new_state(1)
    model.advance(torch.zeros(1, 9, dtype=torch.int64), state)
    counted = accounting.decoding_state_bytes(config)
    length = state.tensors()["length"].nbytes
    assert state.bytes - length == counted["fixed"] + (9 - v1.value_shift) * counted["per_token"]

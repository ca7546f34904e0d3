"""Mosaics whose bandwidth does not adapt, and whose keys have no gates."""

import pytest
import torch

from mmcore.checkpoint.formats.modelconfig import config_from, config_json
from mmcore.checkpoint.hub import hub_config
from mmcore.checkpoint.names import expected_tensors
from mmcore.config import ModelConfig
from mmcore.errors import ConfigError
from mmcore.training.health import measure
from tests.helpers.models import random_tokens, tiny
from tests.model.test_mosaic import PACKINGS, run_loops

LENGTH = len(PACKINGS["packed"])


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_keys_without_gates_equal_the_equations(kernels):
    model = tiny(kernels=kernels, gated_keys=False).double() if kernels == "reference" else tiny(gated_keys=False)
    tokens = random_tokens(1, LENGTH)
    expected = run_loops(model, tokens[0].tolist(), PACKINGS["packed"])
    got = model(tokens, documents=torch.tensor([PACKINGS["packed"]]))[0].double()
    assert (got - expected).abs().max() < (1e-10 if kernels == "reference" else 2e-4)


def test_keys_without_gates_decode_as_they_read():
    model = tiny(gated_keys=False)
    tokens, state = random_tokens(2, 40), model.new_state(2)
    with torch.no_grad():
        got = torch.cat([model.advance(piece, state, last_only=False) for piece in tokens.split([17, *[1] * 23], dim=1)], dim=1)
        assert torch.allclose(got, model(tokens), atol=3e-5)


def test_a_fixed_bandwidth_is_the_same_for_any_number_of_pairs_and_stays_so():
    model = tiny(adaptive_bandwidth=False, lively=False)
    tokens = random_tokens(1, LENGTH)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    exponents = {name: p for name, p in model.named_parameters() if name.endswith("bandwidth_exponent")}
    assert len(exponents) == 4
    assert all(p.grad is None and not p.any() for p in exponents.values())
    moved = [p.grad for name, p in model.named_parameters() if name.endswith("bandwidth_slope")]
    assert all(grad.any() for grad in moved)  # the rest of the bandwidth is trained


@pytest.mark.parametrize("changes", [{"gated_keys": False}, {"adaptive_bandwidth": False}])
def test_config_and_names_go_there_and_back(changes):
    model = tiny(**changes)
    values = config_json(model.config, torch.float32)
    assert config_from(values, "here") == model.config
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected_tensors(model.config)
    # transformers' classes compute gates: they must not be named where there are none
    assert ("auto_map" in hub_config(values)) == model.config.gated_keys
    assert not {"gated_keys", "adaptive_bandwidth"} & set(config_json(tiny().config, torch.float32))


def test_transformers_classes_refuse_keys_without_gates():
    """They would draw the gates at random."""
    pytest.importorskip("transformers")
    from mmcore.hf.configuration_memory_mosaics import MemoryMosaicConfig

    values = {"hidden_size": 32, "num_attention_heads": 4}
    assert MemoryMosaicConfig(**values, gated_keys=True).hidden_size == 32
    with pytest.raises(ValueError, match="gated_keys is false"):
        MemoryMosaicConfig(**values, gated_keys=False)


@pytest.mark.parametrize("key", ["gated_keys", "adaptive_bandwidth"])
def test_only_a_mosaic_has_them(key):
    with pytest.raises(ConfigError, match=f"model.{key} is off for a llama"):
        ModelConfig(model_type="llama", **{key: False})


def test_their_health_is_measured():
    class One:
        def __getitem__(self, index):
            from mmcore.data.packing import Sample

            everything = torch.ones(LENGTH + 1, dtype=torch.bool).numpy()
            return Sample(random_tokens(LENGTH + 1).numpy(), torch.zeros(LENGTH + 1).int().numpy(), everything)

    found = measure(tiny(gated_keys=False), One(), torch.device("cpu"), "fp32")
    for memory in found:
        assert set(memory["log_gate"]) == {0.0}
        assert all(0 < decay <= 1 for decay in memory["decay"])

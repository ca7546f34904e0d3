"""Which projections multiply in 8 bits, what is said where they cannot, and torchao itself, which runs on a CPU too."""

import sys
import types

import numpy as np
import pytest
import torch

from mmcore.config import ModelConfig, build_recipe
from mmcore.distributed import float8
from mmcore.distributed.mesh import start_world, stop_world
from mmcore.distributed.shards import whole
from mmcore.errors import HardwareError
from mmcore.model import build_model
from mmcore.training import checks
from mmcore.training.setup import build
from mmcore.training.step import accumulate
from tests.distributed.scenarios import Batch, cut
from tests.helpers.ranks import run_ranks


def large(**changes):
    settings = dict(vocab_size=1024, hidden_size=512, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=8)
    with torch.device("meta"):
        return build_model(ModelConfig(**(settings | changes)))


def test_the_blocks_large_projections_are_taken():
    chosen = {name for name, module in large().named_modules() if float8.takes_float8(module, name)}
    memories = {f"{m}.{p}_proj" for m in ("short_term", "long_term") for p in ("key", "value")}
    persistent = {f"persistent.{p}_proj" for p in ("gate", "up", "down")}
    assert chosen == {f"model.layers.0.{name}" for name in memories | persistent | {"out_proj"}}


def test_sizes_that_do_not_divide_stay_in_bf16():
    chosen = {name for name, module in large(intermediate_size=1530).named_modules() if float8.takes_float8(module, name)}
    assert chosen and not any(".persistent." in name for name in chosen)


def test_a_cpu_is_refused():
    with pytest.raises(HardwareError, match="fp8, which the device cpu cannot compute: set training.precision=bf16"):
        checks.choose_precision("fp8", torch.device("cpu"))


def test_an_older_gpu_and_a_missing_library_are_refused(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(HardwareError, match="NVIDIA A100 cannot compute"):
        float8.check_float8(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HardwareError, match=r"needs torchao: install it with `pip install 'mm\[float8\]'`"):
        float8.check_float8(device)
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: object())
    float8.check_float8(device)


def test_torchao_is_called_as_it_documents(monkeypatch):
    """convert_to_float8_training(module, *, module_filter_fn, config) -> module."""
    calls = []
    package, module = types.ModuleType("torchao"), types.ModuleType("torchao.float8")
    module.convert_to_float8_training = lambda model, *, module_filter_fn, config=None: (
        calls.append(module_filter_fn) or model
    )
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", module)
    model = large()
    assert float8.use_float8(model) is model and calls == [float8.takes_float8]


SMALL = dict(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
             short_term_window=9, long_term_delay=4, long_term_delay_range=(4, 9), max_position_embeddings=32)  # fmt: skip


def small():
    model = build_model(ModelConfig(**SMALL))
    model.init_weights(0)
    return model


def gradients(precision):
    """The loss of four rows and the whole gradients, of one process or of this rank's share of the rows."""
    cpu = torch.device("cpu")
    world = start_world(cpu)
    recipe = build_recipe({"model": SMALL, "training": {"batch_size": 4, "steps": 1}})
    model = build(recipe, cpu, precision, world=world)
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(1))
    whole_batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.zeros(4, 32, dtype=torch.int32))
    found = accumulate(model, [cut(whole_batch, 4 // world.size)[world.rank]], 5, cpu, precision, world, recipe.distributed)
    result = {name: whole(p.grad).numpy().copy() for name, p in model.named_parameters()} | {"loss": found.loss}
    stop_world(world)
    return result


@pytest.fixture
def torchao():
    return pytest.importorskip("torchao", reason="needs the extra mm[float8]")


@pytest.mark.slow
def test_names_and_weights_stay_and_the_chosen_projections_multiply_in_8_bits(torchao):
    plain, model = small(), float8.use_float8(small())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    changed = {name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"}
    assert changed == {name for name, module in plain.named_modules() if float8.takes_float8(module, name)}
    product, x = model.get_submodule(min(changed)), torch.randn(32, 256)
    exact = x @ product.weight.T
    error = (product(x) - exact).norm() / exact.norm()
    assert 0.01 < error < 0.06  # a value has three bits behind its first: 2 to 3 % of error on either side of a product


@pytest.mark.slow
def test_two_ranks_err_as_much_as_one_process(torchao):
    """Against fp32. The scale of a tensor is that of its largest value, which ranks find each in their own rows."""
    exact, alone = gradients("fp32"), gradients("fp8")
    for found in run_ranks(gradients, 2, "fp8"):
        assert found["loss"] == pytest.approx(exact["loss"], rel=2e-3)
        for name, gradient in exact.items():
            if name != "loss" and gradient.ndim == 2 and gradient.shape[0] > 4:
                one, two = (np.linalg.norm(other[name] - gradient) for other in (alone, found))
                assert 0 < two < 1.2 * one, name  # seen: 0.96 to 1.03 of it

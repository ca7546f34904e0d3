"""Which projections multiply in 8 bits, and what is said where they cannot. torchao itself needs a GPU."""

import sys
import types

import pytest
import torch

from mmcore.config import ModelConfig
from mmcore.distributed import float8
from mmcore.errors import HardwareError
from mmcore.model import build_model
from mmcore.training import checks


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

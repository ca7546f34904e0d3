"""From a path to a model: every architecture and format, filled to the last weight."""

import json
import os

import pytest
import torch

import mmcore
from mmcore.checkpoint.formats import open_checkpoint, write_exported
from mmcore.checkpoint.names import expected_tensors
from mmcore.errors import CheckpointError, ConfigError, HardwareError
from mmcore.model import build_model
from tests.checkpoint.llama_reference import ReferenceLlama
from tests.checkpoint.small import ALL, LLAMA, MOSAIC, TIED, save, weights
from tests.helpers.real_data import DATA, needs_data

TOKENS = torch.arange(40).view(2, 20) % 37


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_the_model_has_the_names_that_checkpoints_have(config):
    with torch.device("meta"):
        model = build_model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == expected_tensors(config)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path, config):
    model = build_model(config)
    model.init_weights(3)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        expected = model.eval()(TOKENS)
    exported = write_exported(tmp_path / "out", config, tensors, max_shard_bytes=4000)
    step = save(tmp_path / "run", 1, config=config, model=tensors)
    for path in (exported, step, tmp_path / "run"):
        loaded = mmcore.load_model(path)
        assert not loaded.training and loaded.knocked_out == frozenset()
        assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
        with torch.no_grad():
            assert torch.equal(loaded(TOKENS), expected)


def test_tied_weights_stay_tied(tmp_path):
    loaded = mmcore.load_model(write_exported(tmp_path / "out", TIED, weights(TIED)))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_dtypes(tmp_path):
    path = write_exported(tmp_path / "out", MOSAIC, weights(), dtype=torch.bfloat16)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        loaded = mmcore.load_model(path, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {expected}


def test_the_model_does_not_depend_on_the_file(tmp_path):
    path = write_exported(tmp_path / "out", MOSAIC, weights())
    loaded = mmcore.load_model(path)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with open(path / "model.safetensors", "r+b") as file:
        file.write(os.urandom((path / "model.safetensors").stat().st_size))
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_knocked_out_memories(tmp_path):
    path = write_exported(tmp_path / "out", MOSAIC, weights())
    loaded = mmcore.load_model(path, without=("long_term",))
    assert loaded.knocked_out == {"long_term"}
    with pytest.raises(ConfigError, match="no memory 'lng_term'"):
        mmcore.load_model(path, without=("lng_term",))


@pytest.mark.parametrize("device", ["cuda:7", "nonsense"])
def test_a_device_that_is_not_there(tmp_path, device):
    path = write_exported(tmp_path / "out", MOSAIC, weights())
    if device.startswith("cuda") and torch.cuda.device_count() > 7:
        pytest.skip("this machine has eight GPUs")
    with pytest.raises(HardwareError, match=f"the device {device} cannot be used .*: choose cpu") as caught:
        mmcore.load_model(path, device=device)
    assert "\n" not in str(caught.value)


def test_nan_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = write_exported(tmp_path / "out", LLAMA, weights(LLAMA))
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][1, 1] = float("nan")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tensor lm_head.weight holds NaN or infinity"):
        mmcore.load_model(path)
    assert open_checkpoint(path, allow_nonfinite=True).tensors["lm_head.weight"].isnan().any()


@needs_data("models/stories260K")
def test_the_baseline_equals_loops_on_real_weights():
    path = DATA / "models/stories260K/stories260K.bin"
    tokens = [1, *torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(0)).tolist()]
    with torch.no_grad():
        ours = mmcore.load_model(path)(torch.tensor([tokens]))[0].double().numpy()
    assert abs(ours - ReferenceLlama(path).logits(tokens)).max() < 1e-4


@needs_data("models/stories260K")
def test_a_llama2c_file_has_its_tokenizer():
    tokenizer = mmcore.load_tokenizer(DATA / "models/stories260K/stories260K.bin")
    text = "Once upon a time, there was a little girl named Lily."
    assert tokenizer.vocab_size == 512 and tokenizer.decode(tokenizer.encode(text)) == text


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    path = write_exported(tmp_path / "out", MOSAIC, weights())
    with pytest.raises(CheckpointError, match="has no tokenizer: put its tokenizer.json or tokenizer.model there"):
        mmcore.load_tokenizer(path)


@pytest.mark.parametrize("settings, message", [
    ({"dtype": "float32"}, "dtype is 'float32': give a torch.dtype"), ({"dtype": torch.int32}, "dtype is torch.int32"),
    ({"dtype": torch.float8_e4m3fn}, "dtype is torch.float8_e4m3fn: give a torch.dtype of floats of 16 bits or more"),
    ({"kernels": "x"}, "kernels is 'x': choose one of auto, reference"), ({"without": "short"}, "no memory 'short'"),
])  # fmt: skip
def test_settings_that_a_model_cannot_have(tmp_path, settings, message):
    path = write_exported(tmp_path / "out", MOSAIC, weights())
    with pytest.raises(ConfigError, match=message):
        mmcore.load_model(path, **settings)
    assert mmcore.load_model(path, without="long_term").knocked_out == {"long_term"}


@pytest.mark.parametrize("tokens, documents", [([7], None), ([2, 7], [7]), ([2, 7], [2, 6]), ([1, 2, 7], None)])
def test_shapes_that_are_no_batch(tmp_path, tokens, documents):
    model = mmcore.load_model(write_exported(tmp_path / "out", MOSAIC, weights()))
    given = [torch.zeros(shape, dtype=torch.int64) for shape in (tokens, documents) if shape is not None]
    with pytest.raises(ConfigError, match=r"must be \[rows, tokens\]"):
        model(*given)


class TestWhereTextsEnd:
    def test_generation_config_counts_too(self, tmp_path):
        path = write_exported(tmp_path / "out", LLAMA, weights(LLAMA), extra={"eos_token_id": 2})
        assert mmcore.load_model(path).stop_ids == {2}
        for ends, expected in ((261, {2, 261}), ([2, 5], {2, 5}), (None, {2}), ([], {2})):
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "temperature": 0.5}))
            assert mmcore.load_model(path).stop_ids == expected
        (path / "generation_config.json").unlink()
        assert mmcore.load_model(path).stop_ids == {2}

    def test_a_text_stops_there(self, tmp_path):
        path = write_exported(tmp_path / "out", LLAMA, weights(LLAMA), extra={"eos_token_id": 2})
        free = list(mmcore.generate(mmcore.load_model(path), [1, 7], max_new_tokens=8))
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, free[3]]}))
        stopped = list(mmcore.generate(mmcore.load_model(path), [1, 7], max_new_tokens=8))
        assert stopped == free[: free.index(free[3]) + 1]

    @pytest.mark.parametrize("content, message", [
        (b"{", "generation_config.json is not usable JSON"), (b"[]", "generation_config.json is not usable JSON"),
        (b'{"eos_token_id": "</s>"}', "generation_config.json: eos_token_id is '</s>' and must be a token id: correct or remove"),
        (b'{"eos_token_id": [2, true]}', r"eos_token_id is \[2, True\] and must be a token id"),
    ])
    def test_a_damaged_one_is_refused(self, tmp_path, content, message):
        path = write_exported(tmp_path / "out", LLAMA, weights(LLAMA))
        (path / "generation_config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            mmcore.load_model(path)

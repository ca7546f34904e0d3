"""Exported folders and llama2.c files, against other libraries and loops in float64."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmcore.checkpoint.formats import open_checkpoint, write_exported
from mmcore.checkpoint.formats.modelconfig import config_from, config_json
from mmcore.checkpoint.names import expected_tensors
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError
from tests.checkpoint.llama_reference import ReferenceLlama, write_llama2c
from tests.checkpoint.small import ALL, LLAMA, MOSAIC, same, save, weights
from tests.helpers.real_data import DATA, needs_data

STORIES = DATA / "models/stories260K/stories260K.bin"
IDS = {"bos_token_id": 1, "eos_token_id": 2}


def hugging_face(folder: Path, **options):
    """The folder as transformers loads it; nothing may be missing, left over or of another shape."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_an_exported_folder_reads_back(tmp_path, config, dtype):
    path = write_exported(tmp_path / "out", config, weights(config), dtype=dtype, extra=IDS, max_shard_bytes=4000)
    read = open_checkpoint(path)
    assert read.config == config and read.dtype == dtype
    assert read.format == ("hf-llama" if config.model_type == "llama" else "exported")
    assert same({name: tensor.to(dtype) for name, tensor in weights(config).items()}, read.tensors)


def test_config_json_of_a_mosaic_is_the_contract():
    assert config_json(MOSAIC, torch.bfloat16, 1, 2) == {
        "model_type": "memory_mosaics_v2", "architectures": ["MemoryMosaicForCausalLM"], "vocab_size": 37,
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "short_term_window": 256, "long_term_delay": 64, "long_term_delay_range": [64, 256], "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "dtype": "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_settings_survive_config_json(config):
    assert config_from(json.loads(json.dumps(config_json(config, torch.float32))), "here") == config


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_rotary_settings_reach_transformers_and_come_back(tmp_path, scaling):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig(**{**vars(LLAMA), "rope_theta": 500_000.0, "rope_scaling": scaling})
    path = write_exported(tmp_path / "ours", config, weights(config), extra=IDS)
    theirs = transformers.AutoConfig.from_pretrained(path)
    assert theirs.rope_parameters["rope_theta"] == 500_000.0
    assert theirs.rope_parameters["rope_type"] == (scaling or {"rope_type": "default"})["rope_type"]
    hugging_face(path).save_pretrained(tmp_path / "theirs")
    read = open_checkpoint(tmp_path / "theirs")
    assert read.config.rope_theta == 500_000.0 and read.config.rope_scaling == scaling
    assert same(weights(config), read.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_the_baseline_loads_in_transformers_complete(tmp_path, name, dtype):
    config = ALL[name]
    path = write_exported(tmp_path / "out", config, weights(config), dtype=dtype, extra=IDS, max_shard_bytes=3000)
    model = hugging_face(path)
    assert model.dtype == dtype, "the dtype in config.json is that of the weights"
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor.to(dtype)) for name, tensor in weights(config).items())
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)


REFUSED = [
    ({"model_type": "gpt2"}, "model_type is 'gpt2', and only"),
    ({"model_type": None}, "model_type is None"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu' and this model only knows 'silu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "only linear and llama3 are known"),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "rope_scaling.factor is -1"),
    ({"num_key_value_heads": 3}, "3 does not divide"),
    ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
    ({"head_dim": 3}, "a head of size 3 cannot be rotated"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ({"vocab_size": "many"}, "vocab_size is 'many': it must be a whole number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"eos_token_id": 2.5}, "eos_token_id is 2.5 and must be a token id"),
    ({"eos_token_id": [2, "</s>"]}, r"eos_token_id is \[2, '</s>'\] and must be a token id"),
    ({"bos_token_id": [1]}, r"bos_token_id is \[1\] and must be a token id"),
    ({"pad_token_id": True}, "pad_token_id is True and must be a token id"),
]


@pytest.mark.parametrize("change, words", REFUSED, ids=[next(iter(change)) for change, _ in REFUSED])
def test_configurations_that_this_model_cannot_be(change, words):
    with pytest.raises(CheckpointError, match=words):
        config_from(config_json(LLAMA, torch.float32) | change, "config.json")


def test_a_folder_without_weights(tmp_path):
    path = write_exported(tmp_path / "out", LLAMA, weights(LLAMA))
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        open_checkpoint(path)


def test_a_configuration_that_points_to_code_runs_none(tmp_path):
    path = write_exported(tmp_path / "out", MOSAIC, weights(), extra={"auto_map": {"AutoModel": "evil.Model"}})
    (path / "evil.py").write_text("raise SystemExit")
    assert open_checkpoint(path).config == MOSAIC


def test_integer_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = write_exported(tmp_path / "out", LLAMA, weights(LLAMA))
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(16, dtype=torch.int8)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.norm.weight is int8, which is no dtype for weights"):
        open_checkpoint(path)


# -- an existing target ----------------------------------------------------------------------------------------


def test_an_existing_target_is_kept_unless_forced(tmp_path):
    path = write_exported(tmp_path / "out", MOSAIC, weights(seed=1))
    with pytest.raises(CheckpointError, match="is there already.*--force"):
        write_exported(path, MOSAIC, weights(seed=2))
    assert same(weights(seed=1), open_checkpoint(path).tensors)
    write_exported(path, MOSAIC, weights(seed=2), force=True)
    assert same(weights(seed=2), open_checkpoint(path).tensors)
    assert os.listdir(tmp_path) == ["out"]


def test_a_forced_target_stays_where_the_new_one_fails(tmp_path):
    path = write_exported(tmp_path / "out", MOSAIC, weights(seed=1))
    broken = weights(seed=2)
    broken["lm_head.weight"][0, 0] = float("inf")
    with pytest.raises(CheckpointError, match="lm_head.weight holds NaN or infinity"):
        write_exported(path, MOSAIC, broken, force=True)

    def refuse(folder):
        raise CheckpointError("no certificate")

    with pytest.raises(CheckpointError, match="no certificate"):
        write_exported(path, MOSAIC, weights(seed=2), force=True, certify=refuse)
    assert same(weights(seed=1), open_checkpoint(path).tensors) and os.listdir(tmp_path) == ["out"]


def test_force_never_removes_what_is_no_export(tmp_path):
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    step = save(tmp_path, 1)
    (tmp_path / "file").write_text("x")
    for target in (home, step, tmp_path / "file", tmp_path):
        with pytest.raises(CheckpointError, match="choose another name"):
            write_exported(target, MOSAIC, weights(), force=True)
    assert (home / "photos").exists() and open_checkpoint(step)
    (tmp_path / "empty").mkdir()
    write_exported(tmp_path / "empty", MOSAIC, weights())


def test_extra_files_and_the_certificate_are_stored(tmp_path):
    path = write_exported(tmp_path / "a/b/out", MOSAIC, weights(), tokenizer_files={"tokenizer.model": b"spm"},
                          certify=lambda folder: {"certificate.json": str(os.listdir(folder)).encode()})  # fmt: skip
    assert (path / "tokenizer.model").read_bytes() == b"spm" and open_checkpoint(path).tokenizer_path == path
    assert "model.safetensors" in (path / "certificate.json").read_text()


def test_weights_that_do_not_fit_are_not_exported(tmp_path):
    with pytest.raises(CheckpointError, match="1 missing"):
        write_exported(tmp_path / "out", MOSAIC, {k: v for k, v in weights().items() if k != "model.norm.weight"})
    with pytest.raises(CheckpointError, match="cannot be exported as int8"):
        write_exported(tmp_path / "out", MOSAIC, weights(), dtype=torch.int8)
    assert os.listdir(tmp_path) == []


# -- llama2.c --------------------------------------------------------------------------------------------------


def check_against_loops(path: Path, folder: Path, tokens: list[int]) -> float:
    checkpoint = open_checkpoint(path)
    model = hugging_face(write_exported(folder, checkpoint.config, checkpoint.tensors, extra=IDS))
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].double().numpy()
    return float(np.abs(theirs - ReferenceLlama(path).logits(tokens)).max())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_llama2c_equals_loops(tmp_path, heads, kv_heads, tied):
    pytest.importorskip("transformers")
    write_llama2c(tmp_path / "m.bin", 24, 20, 2, heads, kv_heads, 31, 16, tied)
    checkpoint = open_checkpoint(tmp_path / "m.bin")
    assert checkpoint.config.tie_word_embeddings == tied and checkpoint.format == "llama2c"
    assert set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
    assert check_against_loops(tmp_path / "m.bin", tmp_path / "out", list(range(3, 20))) < 1e-4


@needs_data("models/stories260K")
def test_stories260K_equals_loops(tmp_path):
    pytest.importorskip("transformers")
    tokens = np.random.default_rng(0).integers(0, 512, 60).tolist()
    assert check_against_loops(STORIES, tmp_path / "out", [1, *tokens]) < 1e-4


@needs_data("models/stories260K")
def test_stories260K_tells_a_story(tmp_path):
    checkpoint = open_checkpoint(STORIES)
    assert sum(tensor.numel() for tensor in checkpoint.tensors.values()) == 260_032
    assert checkpoint.tokenizer_path == STORIES.parent / "tok512.bin"
    model = hugging_face(write_exported(tmp_path / "out", checkpoint.config, checkpoint.tensors, extra=IDS))
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=60, do_sample=False, pad_token_id=0)[0].tolist()
    assert read_tokens(checkpoint.tokenizer_path, ids).startswith("Once upon a time, there was a little girl named")


def read_tokens(path: Path, ids: list[int]) -> str:
    """Tokens as llama2.c prints them: score and length before each, in a file."""
    data, position, pieces = path.read_bytes(), 4, []
    while position < len(data):
        length = struct.unpack_from("<fi", data, position)[1]
        pieces.append(data[position + 8 : position + 8 + length])
        position += 8 + length
    return b"".join(pieces[i] for i in ids if i > 2).decode().strip()


HEADERS = {
    "newer version": (struct.pack("<7i", 0x616B3432, 1, 1, 1, 1, 1, 1), "export it as version 0"),
    "zero": (struct.pack("<7i", 0, 1, 1, 1, 1, 1, 1), "is no llama2.c model"),
    "negative": (struct.pack("<7i", 8, 8, -1, 2, 2, 4, 4), "is no llama2.c model"),
    "lowest": (struct.pack("<7i", 8, 8, 1, 2, 2, -(2**31), 4), r"model.vocab_size is 2147483648: it must be at least 1 and below 2\*\*31"),
    "huge": (struct.pack("<7i", *[2**31 - 1] * 7), "is no llama2.c model"),
    "heads": (struct.pack("<7i", 8, 8, 1, 3, 1, 4, 4), "is no llama2.c model"),
    "empty": (b"", "too short"),
    "zip": (b"PK\x03\x04" + bytes(40), "is cut short or damaged"),
    "pickle": (b"\x80\x02\x8a\x0a" + bytes(40), "a bare pickle, which is never read"),
    "width 640": (b"\x80\x02" + bytes(40), "its header reads 640, 0, 0"),  # no pickle, though it begins like one
    "cut short": (struct.pack("<7i", 8, 8, 1, 2, 2, 4, 4) + bytes(100), "has 128 bytes and its header implies"),
}


@pytest.mark.parametrize("data, words", HEADERS.values(), ids=HEADERS)
def test_files_that_are_no_llama2c_model(tmp_path, data, words):
    (tmp_path / "m.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "m.bin")


def test_random_llama2c_headers(tmp_path):
    write_llama2c(tmp_path / "m.bin", 24, 20, 2, 4, 2, 31, 16, True)
    original, generator = (tmp_path / "m.bin").read_bytes(), np.random.default_rng(0)
    opened = 0
    for _ in range(500):
        data = bytearray(original)
        for _ in range(generator.integers(1, 4)):
            data[generator.integers(0, 28)] = generator.choice([0, 1, 255, generator.integers(0, 256)])
        (tmp_path / "m.bin").write_bytes(data)
        try:
            open_checkpoint(tmp_path / "m.bin")
            opened += 1
        except CheckpointError:
            continue
    assert opened < 50


def test_import_stays_light():
    code = "import sys, mmcore, mmcore.errors; print('torch' in sys.modules, 'numpy' in sys.modules, dir(mmcore))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("False False") and "load_model" in run.stdout and "generate" in run.stdout
    import mmcore

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmcore.nothing
    project = (Path(mmcore.__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{mmcore.__version__}"' in project

"""Every pair of formats: what went in comes out, bit for bit, where no rounding is due."""

import itertools
import json

import pytest
import torch

import mmcore
from mmcore.checkpoint.convert import convert_checkpoint
from mmcore.checkpoint.formats import open_checkpoint, write_exported
from mmcore.checkpoint.store import load_state
from mmcore.checkpoint.verify import verify_conversion
from tests.checkpoint.llama_reference import write_llama2c
from tests.checkpoint.small import ALL, LLAMA, MOSAIC, TIED, moments, same, save, weights
from tests.helpers.real_data import DATA, needs_data

NAMES = {"hf": "out", "train": "run", "torch": "model.pt"}


def tour(folder, source, stations, **options):
    """Convert from station to station; the last result."""
    for number, to in enumerate(stations):
        target = folder / f"{number}-{to}" / NAMES[to]
        made = convert_checkpoint(source, target, to=to, **options)
        assert made.result_format == to and not made.rounded and made.largest_difference == made.tolerance == 0
        source = target
    return source


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float16))])
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_every_pair_of_formats(tmp_path, config, dtype):
    """hf, train, torch in an order in which each follows each, itself too."""
    tensors = weights(config, 3, dtype)
    source = write_exported(tmp_path / "source", config, tensors, dtype=dtype, extra={"eos_token_id": [2, 5]})
    end = tour(tmp_path, source, ["hf", "hf", "train", "train", "torch", "torch", "hf", "torch", "train", "hf"])
    read = open_checkpoint(end)
    assert read.config == config and read.dtype == dtype and read.config_json["eos_token_id"] == [2, 5]
    assert same(tensors, read.tensors)


def test_a_wider_dtype_and_back_is_exact(tmp_path):
    source = write_exported(tmp_path / "source", MOSAIC, weights(MOSAIC, 1), dtype=torch.bfloat16)
    wide = convert_checkpoint(source, tmp_path / "wide.pt", to="torch", dtype=torch.float32)
    assert not wide.rounded and wide.largest_difference == 0
    back = convert_checkpoint(tmp_path / "wide.pt", tmp_path / "back", dtype=torch.bfloat16)
    assert back.rounded and back.largest_difference == 0 < back.tolerance
    assert same(dict(open_checkpoint(source).tensors), open_checkpoint(tmp_path / "back").tensors)


def test_fp64_becomes_fp32_unless_another_dtype_is_asked_for(tmp_path):
    model = {name: tensor.double() for name, tensor in weights(LLAMA).items()}
    torch.save({"model": model, "config": open_config(tmp_path)}, tmp_path / "m.pt")
    made = convert_checkpoint(tmp_path / "m.pt", tmp_path / "out")
    assert made.dtype == "float32" and made.largest_difference == 0
    assert same(weights(LLAMA), open_checkpoint(tmp_path / "out").tensors)


def open_config(folder):
    path = write_exported(folder / "for-its-config", LLAMA, weights(LLAMA))
    return json.loads((path / "config.json").read_text())


def test_a_training_checkpoint_keeps_all_that_training_needs(tmp_path):
    step = save(tmp_path / "run", 7, shard_bytes=4000, config=MOSAIC)
    made = convert_checkpoint(tmp_path / "run", tmp_path / "new", to="train")
    assert made.optimizer == "kept" and made.source_format == "training"
    new = tmp_path / "new/checkpoints/step-000007"
    before, after = load_state(step), load_state(new, verify=True)
    assert after.state == before.state and after.step == 7 and after.config_json == before.config_json
    assert same(weights(MOSAIC, 7), after.model) and same(moments(weights(MOSAIC, 7), 7), after.optimizer)
    for name in ("recipe.yaml", "tokenizer.model"):
        assert (new / name).read_bytes() == (step / name).read_bytes()


def test_weights_from_elsewhere_have_fresh_moments_and_say_so(tmp_path):
    source = write_exported(tmp_path / "source", TIED, weights(TIED))
    made = convert_checkpoint(source, tmp_path / "run", to="train")
    assert made.optimizer == "fresh" and any("fresh moments" in note for note in made.notes)
    state = load_state(tmp_path / "run/checkpoints/step-000000", verify=True)
    assert state.step == 0 and len(state.optimizer) == 0 and state.state["converted_from"]["format"] == "hf-llama"


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_to_everything(tmp_path, tied):
    write_llama2c(tmp_path / "m.bin", 24, 20, 2, 4, 2, 31, 16, tied)
    end = tour(tmp_path, tmp_path / "m.bin", ["torch", "hf", "train", "torch"])
    assert same(dict(open_checkpoint(tmp_path / "m.bin").tensors), open_checkpoint(end).tensors)


@pytest.mark.slow
@needs_data("models/stories260K")
def test_the_tokenizer_goes_along(tmp_path):
    source = DATA / "models/stories260K/stories260K.bin"
    text = "Lily went to the park. — 😀"
    ids = mmcore.load_tokenizer(source).encode(text)
    for first, second in itertools.permutations(NAMES, 2):
        end = tour(tmp_path / f"{first}-{second}", source, [first, second])
        tokenizer = mmcore.load_tokenizer(end)
        assert tokenizer.encode(text) == ids and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        model = mmcore.load_model(end)
        story = tokenizer.decode(list(mmcore.generate(model, [1], max_new_tokens=20)))
        assert story.startswith("Once upon a time, there was a little girl named")
    assert verify_conversion(end).source == "compared again"

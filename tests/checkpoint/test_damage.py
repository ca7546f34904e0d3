"""Damaged checkpoints: found, named, and passed over; strangers' files: nothing but CheckpointError comes out."""

import json
import random
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmcore.checkpoint.formats import open_checkpoint
from mmcore.checkpoint.load import load_model, load_tokenizer
from mmcore.checkpoint.resolve import resolve_checkpoint
from mmcore.checkpoint.store import load_state, whole_checkpoints
from mmcore.errors import CheckpointError
from tests.checkpoint.small import LLAMA, MOSAIC, same, save, weights


def flip(path: Path, place: int = -5, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def truncate(path: Path, size: int = -1) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = {
    "a flipped bit in the weights": (lambda p: flip(p / "model-00002-of-00003.safetensors"), "00002.* was altered"),
    "a flipped bit in the moments": (lambda p: flip(next(p.glob("optimizer-00001-*"))), "altered"),
    "a flipped bit in the configuration": (lambda p: flip(p / "config.json", 40), "config.json was altered"),
    "a flipped bit in the recipe": (lambda p: flip(p / "recipe.yaml"), "recipe.yaml was altered"),
    "a shard cut short": (lambda p: truncate(p / "model-00001-of-00003.safetensors", 900), "has 900 bytes of"),
    "an empty file": (lambda p: (p / "trainer.json").write_bytes(b""), "trainer.json has 0 bytes of"),
    "a shard missing": (lambda p: (p / "model-00003-of-00003.safetensors").unlink(), "00003.* is missing"),
    "the manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "the manifest cut short": (lambda p: truncate(p / "manifest.json", 100), "not usable JSON"),
    "another step's manifest": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace(
            '"step": 2', '"step": 3')), "manifest is of step 3"),
    "a file made a link": (lambda p: (p / "trainer.json").rename(p / "x") and (p / "trainer.json").symlink_to(p / "x"),
                           "is a link"),
    "the manifest of the future": (
        lambda p: (p / "manifest.json").write_text((p / "manifest.json").read_text().replace(
            '"format_version": 1', '"format_version": 2')), "install a newer mm"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_used(tmp_path, damage):
    good = save(tmp_path, 1, shard_bytes=10_000)
    bad = save(tmp_path, 2, shard_bytes=10_000)
    apply, words = DAMAGES[damage]
    apply(bad)
    skipped = []
    assert whole_checkpoints(tmp_path, skipped.append) == [good]
    assert len(skipped) == 1 and "\n" not in skipped[0] and "step-000002" in skipped[0]
    assert re.search(words, skipped[0])


def test_all_damage_of_one_checkpoint_is_told_at_once(tmp_path):
    path = save(tmp_path, 1)
    flip(path / "model.safetensors")
    (path / "trainer.json").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors was altered; trainer.json is missing; give the run"):
        resolve_checkpoint(path)


def test_every_flipped_bit_is_found(tmp_path):
    """Or does no harm: of the manifest only its remarks may change."""
    path = save(tmp_path, 1, config=LLAMA)
    generator = random.Random(0)
    for file in sorted(path.iterdir()):
        original = file.read_bytes()
        for _ in range(20):
            flip(file, generator.randrange(len(original)), 1 << generator.randrange(8))
            try:
                resolve_checkpoint(path)
            except CheckpointError:
                pass
            else:
                assert file.name == "manifest.json"
                changed = json.loads(file.read_text())
                assert {**changed, "mm_version": 0} == {**json.loads(original), "mm_version": 0}
            file.write_bytes(original)
    assert resolve_checkpoint(path) == path


def test_extra_files_do_no_harm(tmp_path):
    path = save(tmp_path, 1)
    save_file({"stray": torch.zeros(1)}, path / "model-00009-of-00009.safetensors")
    (path / "notes.txt").write_text("mine")
    assert whole_checkpoints(tmp_path) == [path]
    assert same(weights(MOSAIC, 1), load_state(path).model)


def test_an_index_beside_the_weights_does_not_change_what_is_read(tmp_path):
    path = save(tmp_path, 1)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert same(weights(MOSAIC, 1), load_state(path).model)
    assert same(weights(MOSAIC, 1), open_checkpoint(path).tensors)
    assert whole_checkpoints(tmp_path) == [path]


def test_a_run_falls_back_and_says_so(tmp_path, caplog):
    save(tmp_path, 1)
    flip(save(tmp_path, 2) / "model.safetensors")
    assert resolve_checkpoint(tmp_path).name == "step-000001"
    assert "passed over" in caplog.text and "step-000002" in caplog.text
    heard = []
    resolve_checkpoint(tmp_path, heard.append)
    assert len(heard) == 1


def test_a_damaged_header_is_passed_over_by_whoever_asks_for_no_hashes(tmp_path, caplog):
    """The tokenizer of a run is read so, before or after its model."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    flip(newest / "model.safetensors", 14, 6)  # in the first tensor's name
    assert open_checkpoint(tmp_path, verify=False).path.name == "step-000001" and "step-000002" in caplog.text
    assert load_tokenizer(tmp_path).vocab_size > 256 and load_model(tmp_path) is not None
    with pytest.raises(CheckpointError, match="step-000002"):
        open_checkpoint(newest, verify=False)


def test_a_run_without_a_whole_checkpoint(tmp_path):
    truncate(save(tmp_path, 1) / "config.json")
    with pytest.raises(CheckpointError, match="has no whole checkpoint: passed over .*config.json has"):
        open_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/step-000001")
    with pytest.raises(CheckpointError, match="no whole checkpoint: let the run reach its first one"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "path, words",
    [("nowhere", "there is no checkpoint at"), ("a.txt", "give the folder it lies in"),
     ("empty", "holds no checkpoint")],
)  # fmt: skip
def test_paths_that_are_no_checkpoint(tmp_path, path, words):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / path)


def test_a_run_can_be_named_in_three_ways(tmp_path):
    path = save(tmp_path, 4)
    for name in (tmp_path, tmp_path / "checkpoints", path, str(tmp_path)):
        assert resolve_checkpoint(name) == path


# -- fuzz ------------------------------------------------------------------------------------------------------


def mutate(data: bytes, generator: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 3, 10))):
        place = generator.randrange(len(data) + 1)
        kind = generator.randrange(6)
        if kind == 0 and place < len(data):
            data[place] = generator.randrange(256)
        elif kind == 1:
            del data[place : place + generator.randrange(1, 20)]
        elif kind == 2:
            data[place:place] = generator.randbytes(generator.randrange(1, 5))
        elif kind == 3:
            start = generator.randrange(len(data) + 1)
            data[place:place] = data[start : start + generator.randrange(1, 60)]
        elif kind == 4:
            words = (b"null", b"-1", b"1e400", b"NaN", b"[]", b"{}", b'""', b"true", b"99999999999999999999", b"0.5",
                     b'"\\ud800"', b"..", b"-0", b'"linear"')  # fmt: skip
            data[place:place] = generator.choice(words)
        else:  # replace a number
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[generator.choice(digits)] = generator.randrange(48, 58)
    return bytes(data)


JSON_VALUES = (None, -1, 0, 1.5, 1e308, -(10**30), 10**400, True, "", "x", [], [1], {}, {"a": 1}, float("nan"),
               float("inf"), [1, -1], [64, 10**25], {"rope_type": "llama3"}, {"type": 3},
               {"rope_type": []})  # fmt: skip


def exported(folder: Path, config) -> Path:
    path = save(folder, 1, config=config, shard_bytes=6000, files={})
    for name in ("manifest.json", "trainer.json"):
        (path / name).unlink()
    return path


def read_all(path: Path) -> None:
    tensors = open_checkpoint(path).tensors
    for name in list(tensors)[:3]:
        tensors[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-*"])
def test_mutated_files_raise_nothing_else(tmp_path, name):
    path = exported(tmp_path, LLAMA)
    name = next(path.glob(name)).name
    original = (path / name).read_bytes()
    header = 8 + struct.unpack("<Q", original[:8])[0] if name.endswith(".safetensors") else len(original)
    generator = random.Random(name)
    refused = 0
    for _ in range(1200):
        (path / name).write_bytes(mutate(original[:header], generator) + original[header:])
        try:
            read_all(path)
        except CheckpointError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 20_000
    assert refused > 600
    (path / name).write_bytes(original)
    read_all(path)


@pytest.mark.parametrize("config", [LLAMA, MOSAIC], ids=["llama", "mosaic"])
def test_any_value_under_any_key_of_the_configuration(tmp_path, config):
    path = exported(tmp_path, config)
    values = json.loads((path / "config.json").read_text())
    for key in [*values, "rope_parameters", "head_dim", "quantization_config", "auto_map"]:
        for value in JSON_VALUES:
            (path / "config.json").write_text(json.dumps(values | {key: value}))
            try:
                read_all(path)
            except CheckpointError as error:
                assert str(error).isprintable()


def test_mutated_manifests_raise_nothing_else(tmp_path):
    path = save(tmp_path, 1)
    original = (path / "manifest.json").read_bytes()
    generator = random.Random(1)
    for _ in range(300):
        (path / "manifest.json").write_bytes(mutate(original, generator))
        whole_checkpoints(tmp_path, lambda sentence: None)


def test_moments_are_compared_with_the_weights_before_they_are_read(tmp_path):
    path = save(tmp_path, 1)
    tensors = load_file(path / "optimizer.safetensors")
    tensors["exp_avg.lm_head.weight"] = torch.zeros(2, 2)
    save_file(tensors, path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="has .* bytes of"):
        load_state(path)
    record = json.loads((path / "manifest.json").read_text())
    record["files"]["optimizer.safetensors"]["bytes"] = (path / "optimizer.safetensors").stat().st_size
    (path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"exp_avg.lm_head.weight is \[2, 2\] and must be \[37, 16\]"):
        load_state(path)

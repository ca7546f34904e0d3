"""Certificates: they say what is so, and are checked again later."""

import dataclasses
import json
import os
import shutil

import pytest
import torch

from mmcore.checkpoint import certificate, disk
from mmcore.checkpoint.certificate import compare, is_rounded, path_of, read_certificate, require_same
from mmcore.checkpoint.convert import convert_checkpoint
from mmcore.checkpoint.formats import open_checkpoint, write_exported
from mmcore.checkpoint.tensorfile import LazyTensors, TensorSpec
from mmcore.checkpoint.verify import verify_conversion
from mmcore.errors import CheckpointError
from tests.checkpoint.small import ALL, LLAMA, MOSAIC, save, weights

RESULTS = {"hf": "out", "train": "run", "torch": "model.pt"}


@pytest.mark.parametrize("to", RESULTS)
def test_a_result_is_verified_with_and_without_its_source(tmp_path, to):
    source, result = save(tmp_path / "source", 1), tmp_path / RESULTS[to]
    made = convert_checkpoint(source, result, to=to, command="mm convert ...")
    found = verify_conversion(result)
    assert found.logits == "equal" and found.largest_difference == 0 and found.source == "compared again"
    shutil.rmtree(tmp_path / "source")
    moved = tmp_path / "moved" / RESULTS[to]
    moved.parent.mkdir()
    os.rename(result, moved)
    if to == "torch":
        os.rename(path_of(result), path_of(moved))
    found = verify_conversion(moved)
    assert found.source == "not there" and found.logits == "equal" and found.files == len(made.result_files)
    folder = {"train": moved / "checkpoints/step-000001"}.get(to, moved)
    assert read_certificate(path_of(folder)) == made
    assert made.command == "mm convert ..." and made.versions["torch"] == torch.__version__
    for name, sha256 in made.result_files.items():
        assert disk.hash_file((folder if folder.is_dir() else folder.parent) / name).sha256 == sha256


def test_a_source_that_changed_is_said_to_have(tmp_path):
    source = write_exported(tmp_path / "source", MOSAIC, weights(seed=1))
    convert_checkpoint(source, tmp_path / "out")
    write_exported(source, MOSAIC, weights(seed=2), force=True)
    assert verify_conversion(tmp_path / "out").source == "changed since"


@pytest.mark.parametrize("to", RESULTS)
def test_altered_results_are_found(tmp_path, to):
    result = tmp_path / RESULTS[to]
    convert_checkpoint(save(tmp_path / "source", 1), result, to=to)
    folder = {"train": result / "checkpoints/step-000001"}.get(to, result)
    file = folder / "model.safetensors" if folder.is_dir() else folder
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file.name} was altered"):
        verify_conversion(folder)
    if to == "hf":
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match="was altered|is missing|no checkpoint"):
            verify_conversion(folder)


def test_logits_from_elsewhere_may_round_differently_but_not_more(tmp_path):
    convert_checkpoint(save(tmp_path / "source", 1), tmp_path / "out")
    path = tmp_path / "out/certificate.json"
    values = json.loads(path.read_text())
    values["logits_sha256"] = "0" * 64
    values["samples"][3] += 1e-6 * values["largest_logit"]
    path.write_text(json.dumps(values))
    found = verify_conversion(tmp_path / "out")
    assert found.logits == "close" and 0 < found.largest_difference < 1e-5
    values["samples"][3] += 1e-2 * values["largest_logit"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="its logits differ from the recorded ones by"):
        verify_conversion(tmp_path / "out")


def test_certificates_from_strangers(tmp_path):
    convert_checkpoint(save(tmp_path / "source", 1), tmp_path / "out")
    path = tmp_path / "out/certificate.json"
    good = json.loads(path.read_text())
    for change, words in [
        ({"samples": [1.0]}, "has not 64 samples"), ({"samples": ["x"] * 64}, "a number is none"),
        ({"result_files": {"../../etc/passwd": "0" * 64}}, "result_files has the entry"),
        ({"result_files": {"config.json": "short"}}, "result_files has the entry"), ({"source_files": []}, "are no files"),
        ({"dtype": "load"}, "its dtype is none"), ({"source": 5}, "a text is none"),
        ({"result_files": {"config.json": "0" * 64}}, "config.json was altered"),
    ]:  # fmt: skip
        path.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=words):
            verify_conversion(tmp_path / "out")
    path.write_text(json.dumps({key: value for key, value in good.items() if key != "samples"}))
    with pytest.raises(CheckpointError, match="lacks samples"):
        verify_conversion(tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match="only what `mm convert` wrote can be verified"):
        verify_conversion(tmp_path / "out")


def in_memory(source, tensors):
    """The checkpoint with other weights."""
    readers = {name: (lambda tensor=tensor: tensor) for name, tensor in tensors.items()}
    return dataclasses.replace(source, tensors=LazyTensors(readers, source.tensors.specs, source.path))


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_every_tensor_counts(tmp_path, config):
    """A result in which any one weight is another is caught, however little it matters to the logits."""
    config = dataclasses.replace(config, num_hidden_layers=1)
    tensors = weights(config)
    source = open_checkpoint(write_exported(tmp_path / "source", config, tensors))
    compare(source, in_memory(source, tensors), torch.float32, lambda count: None)
    for name in tensors:
        changed = dict(tensors)
        changed[name] = tensors[name].clone()
        flat = changed[name].view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))
        with pytest.raises(CheckpointError, match=f"the result's {name} is not the source's in float32"):
            compare(source, in_memory(source, changed), torch.float32, lambda count: None)


def test_rows_that_were_permuted_are_caught(tmp_path):
    """What a wrong rotary permutation would do, which leaves shapes and statistics as they are."""
    tensors = weights(LLAMA)
    name = "model.layers.0.self_attn.q_proj.weight"
    source = open_checkpoint(write_exported(tmp_path / "source", LLAMA, tensors))
    result = open_checkpoint(write_exported(tmp_path / "out", LLAMA, tensors | {name: tensors[name].flip(0)}))
    with pytest.raises(CheckpointError, match="is not the source's"):
        compare(source, result, torch.float32, lambda count: None)


def test_nan_equals_nan_and_zero_is_not_minus_zero():
    nan = torch.tensor([float("nan"), 1.0])
    require_same("a", nan, nan.clone(), torch.float32)
    with pytest.raises(CheckpointError, match="the result's a is not"):
        require_same("a", torch.zeros(2), -torch.zeros(2), torch.float32)
    with pytest.raises(CheckpointError, match=r"is \[2\] and the source's \[3\]"):
        require_same("a", torch.zeros(3), torch.zeros(2), torch.float32)


def test_what_counts_as_rounding():
    wide, narrow = TensorSpec(torch.float32, (1,)), TensorSpec(torch.bfloat16, (1,))
    assert not is_rounded([wide, narrow], torch.float32) and not is_rounded([narrow], torch.bfloat16)
    assert is_rounded([wide, narrow], torch.bfloat16) and is_rounded([narrow], torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_rounding_stays_within_its_tolerance(tmp_path, config, dtype):
    source = write_exported(tmp_path / "source", config, weights(config))
    made = convert_checkpoint(source, tmp_path / "out", dtype=dtype)
    assert made.rounded and 0 < made.largest_difference < made.tolerance / 1.5
    assert certificate.TOKENS <= made.tokens


def test_the_tolerance_follows_from_the_model(tmp_path):
    """Sharp memories amplify what rounding does to a key; the same share of a logit would fit only one of the two."""
    shares = []
    for sharper in (0.0, 2.0):
        tensors = {name: t + sharper * ("bandwidth_base" in name) for name, t in weights(MOSAIC).items()}
        source = write_exported(tmp_path / f"source-{sharper}", MOSAIC, tensors)
        made = convert_checkpoint(source, tmp_path / f"out-{sharper}", dtype=torch.bfloat16)
        assert made.largest_difference <= made.tolerance
        shares.append(made.tolerance / made.largest_logit)
    assert shares[1] > 1.2 * shares[0]

"""Files with exactly the public v1 code's names and shapes, and files that only look like them."""

import contextlib
import io
import json
import shutil
import zipfile
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch

import mmcore
from mmcore.checkpoint.convert import convert_checkpoint
from mmcore.checkpoint.formats import open_checkpoint
from mmcore.checkpoint.names import expected_tensors
from mmcore.errors import CheckpointError
from tests.helpers import v1_files, v1_loops
from tests.helpers.models import random_tokens
from tests.helpers.real_data import DATA, needs_data

KINDS = ("nano", "library", "eft")


def rewrite(path, change):
    """Apply `change` to the dict that a file holds and save it again."""
    held = torch.load(path, weights_only=True)
    change(held)
    torch.save(held, path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_loads_from_its_path_or_folder(tmp_path, kind, prefix):
    path = v1_files.save(tmp_path / "out" / "ckpt.pt", kind, prefix=prefix)
    for given in (path, tmp_path / "out"):
        opened = open_checkpoint(given)
        assert opened.format == "v1" and opened.path == path and opened.weight_files == (path,)
        assert {name: tuple(t.shape) for name, t in opened.tensors.items()} == expected_tensors(opened.config)
        assert opened.config.max_position_embeddings == 24 and opened.config.v1.variant == ("nano" if kind == "nano" else "library")


@pytest.mark.parametrize("kind", KINDS)
def test_export_and_back(tmp_path, kind):
    """The exported folder holds the same bits, and loads to the same logits; the certificate says so."""
    changes = {"bias": True, "pmem_count": 2}
    path = v1_files.save(tmp_path / "ckpt.pt", kind, **changes)
    certificate = convert_checkpoint(path, tmp_path / "hf", max_shard_bytes=9000)
    assert certificate.source_format == "v1" and certificate.largest_difference == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "memory_mosaics_v1" and config["architectures"] == ["MemoryMosaicV1ForCausalLM"]
    a, b = open_checkpoint(path), open_checkpoint(tmp_path / "hf")
    assert b.config == a.config and b.format == "exported"
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in expected_tensors(a.config))
    tokens = random_tokens(1, 10)
    with torch.no_grad():
        got = mmcore.load_model(tmp_path / "hf", dtype=torch.float64)(tokens)[0]
    want = v1_loops.logits(*v1_files.state_dict(kind, **changes), tokens[0].tolist())
    assert (got - want).abs().max() < 1e-11 * want.abs().max()


def test_generation_takes_the_token_of_the_largest_logit(tmp_path):
    path = v1_files.save(tmp_path / "ckpt.pt", "library")
    state, args = v1_files.state_dict("library")
    ids = [3, 14, 15]
    for token in mmcore.generate(mmcore.load_model(path), ids, max_new_tokens=6):
        assert token == int(v1_loops.logits(state, args, ids)[-1].argmax())
        ids.append(token)
    assert len(ids) == 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats(tmp_path, dtype):
    opened = open_checkpoint(v1_files.save(tmp_path / "ckpt.pt", "library", dtype=dtype))
    assert opened.dtype == dtype and opened.tensors["model.norm.weight"].dtype == dtype


def test_nan_weights_are_refused_when_read(tmp_path):
    path = rewrite(v1_files.save(tmp_path / "ckpt.pt", "nano"), lambda held: held["model"]["mosaic.ln_f.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        mmcore.load_model(path)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_unexpected_and_misshapen_tensors_are_all_listed(tmp_path, kind):
    path = v1_files.save(tmp_path / "ckpt.pt", kind)
    norm, projection = ("mosaic.h.1.ln_1.weight", "mosaic.h.0.mlp.c_proj.weight") if kind == "nano" else (
        "blocks.1.ln1.weight", "blocks.0.pmem.c_proj.weight")

    def change(held):
        del held["model"][norm]
        held["model"]["mystery.weight"] = torch.zeros(3)
        held["model"]["mystery.bias"] = torch.zeros(3)
        held["model"][projection] = torch.zeros(32, 31)

    rewrite(path, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert f"1 missing ({norm})" in text and "2 unexpected (mystery.weight, mystery.bias)" in text
    assert f"1 misshapen ({projection} is [32, 31] and must be [32, 32])" in text and "\n" not in text


def _args(**changes):
    return lambda held: held["model_args"].update(changes)


def _drop(name):
    return lambda held: held["model_args"].pop(name)


def _set(name, value):
    def change(held):
        held["model"][name] = value
    return change


FAULTS = {
    "untied head": ("nano", _set("lm_head.weight", torch.zeros(61, 32)), "lm_head.weight differs from mosaic.wte.weight"),
    "two decays": ("eft", _set("blocks.0.attn.leaky_average.leaky_beta_u_under", torch.ones(4)), "beta_u_under differs from"),
    "other mask": ("nano", _set("mosaic.h.0.attn.bias", torch.ones(1, 1, 24, 24, dtype=torch.bool)), "h.0.attn.bias is not the table"),
    "other ages": ("nano", _set("mosaic.h.1.mlp.k_featurizer.leaky_avg.coef", torch.zeros(24, 24)), "leaky_avg.coef is not the table"),
    "small mask": ("nano", _set("mosaic.h.0.attn.bias", torch.zeros(1, 1, 4, 4).bool()), "h.0.attn.bias is not the table"),
    "a number for a tensor": ("nano", _set("mosaic.ln_f.weight", 3), "mosaic.ln_f.weight is no tensor"),
    "a wide claim": ("nano", _set("mosaic.ln_f.weight", torch.zeros(1).expand(1 << 40)), "claims more numbers than the file"),
    "whole numbers": ("nano", _set("mosaic.ln_f.weight", torch.ones(32, dtype=torch.int64)), "ln_f.weight is int64, which is no dtype"),
    "sparse": ("nano", _set("mosaic.ln_f.weight", torch.eye(32).to_sparse()), "is no dense tensor"),
    "both spellings": ("nano", _set("_orig_mod.mosaic.ln_f.weight", torch.ones(32)), "mosaic.ln_f.weight is there twice"),
    "no settings": ("nano", lambda held: held.pop("model_args"), "holds no `model` with its `model_args`"),
    "no model": ("nano", lambda held: held.pop("model"), "holds no `model` with its `model_args`"),
    "a setting missing": ("nano", _drop("n_head"), "n_head is missing and must be a whole number from 1"),
    "a flag as a number": ("library", _args(pre_ln=1), "pre_ln is 1 and must be true or false"),
    "no such features": ("library", _args(k_fe_type="reluconv"), "k_fe_type is 'reluconv' and must be linearconv or lowrlinearconv"),
    "a wrong kernel": ("library", _args(v_kernel_size=3), "v_kernel_size must be 2 with lowrlinearconv"),
    "a huge kernel": ("library", _args(k_kernel_size=2000), "below 1024"),
    "too many layers": ("nano", _args(n_layer=1 << 30), "n_layer is 1073741824 and it holds"),
    "odd heads": ("nano", _args(n_head=5), "does not divide into 5 heads"),
    "one layer fewer": ("library", _args(n_layer=1), "16 unexpected"),
    "a longer context": ("nano", _args(block_size=25), "is not the table"),
    "gpt": ("nano", lambda held: held.update(model=OrderedDict({"transformer.wte.weight": torch.zeros(2, 2)})), "is a GPT-2 of nanoMosaics"),
    "another model": ("nano", lambda held: held.update(model={"a": torch.zeros(2)}), "none of the public v1 models"),
    "a list": ("nano", lambda held: held.update(model=[1, 2]), "holds no `model`"),
}


@pytest.mark.parametrize(("kind", "change", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_files_that_do_not_fit(tmp_path, kind, change, message):
    path = v1_files.save(tmp_path / "ckpt.pt", kind)
    held = torch.load(path, weights_only=True)
    change(held)
    torch.save(held, path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value) and len(str(caught.value)) < 1500


def test_one_storage_under_many_names_is_no_model(tmp_path):
    """A megabyte must not become a gigabyte by being named a thousand times."""
    path = v1_files.save(tmp_path / "ckpt.pt", "library", n_layer=12)

    def change(held):
        shared = torch.zeros(32 * 32)
        for name, tensor in held["model"].items():
            if tensor.shape in ((32, 32), (32, 32, 1)):
                held["model"][name] = shared.view(tensor.shape)
        held.pop("optimizer")

    rewrite(path, change)
    with pytest.raises(CheckpointError, match="share their numbers"):
        open_checkpoint(path)


class _Touch:
    """What a pickle can do: run a function of its choice."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_code_of_a_file_is_run(tmp_path):
    path = v1_files.save(tmp_path / "ckpt.pt", "nano")
    held = torch.load(path, weights_only=True)
    for name, payload in (("call", _Touch(tmp_path / "ran")), ("namespace", Namespace(a=1)), ("bytes", bytearray(8))):
        torch.save(held | {"config": payload}, path)
        with pytest.raises(CheckpointError, match="could run code and is never loaded"):
            open_checkpoint(path)
        assert not (tmp_path / "ran").exists(), name


def test_damaged_archives(tmp_path):
    path = v1_files.save(tmp_path / "ckpt.pt", "nano")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}

    def refused(content, message="is cut short or damaged|no PyTorch file|before 1.6"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)

    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        refused(whole[:size])
    refused(b"\x80\x02}q\x00.")  # a bare pickle, as torch.save wrote before 1.6
    place = whole.index(entries["ckpt/data/0"][:64])
    refused(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :], "data/0 was altered")

    def zipped(compression=zipfile.ZIP_STORED, **changes):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in (entries | changes).items():
                archive.writestr(name, content)
        return path.read_bytes()

    refused(zipped(zipfile.ZIP_DEFLATED), "is compressed")
    refused(zipped(**{"ckpt/code/model.py": b"import os"}), "TorchScript")
    refused(zipped(**{"other/data.pkl": b""}), "none of PyTorch's")
    refused(zipped(**{"ckpt/byteorder": b"big"}), "big-endian")
    path.unlink()
    (tmp_path / "real.pt").write_bytes(whole)
    path.symlink_to("real.pt")
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(path)


@pytest.mark.slow
@needs_data("tokenizers/gpt2")
def test_the_commands_work_on_a_file_with_gpt2s_tokenizer(tmp_path):
    """mm eval and mm chat with the tokenizer given, then beside the file; mm convert; the result speaks the same."""
    from mmcli.app import app

    def mm(*words):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            app([str(word) for word in words], standalone_mode=False)
        return out.getvalue()

    gpt2 = DATA / "tokenizers/gpt2"
    path = v1_files.save(tmp_path / "ckpt.pt", "library", vocab_size=50304, n_embd=16, n_head=2, n_layer=1, block_size=32)
    assert open_checkpoint(path).config_json["eos_token_id"] == 50256
    (tmp_path / "text.txt").write_text("Once upon a time there was a small mosaic. " * 9)
    say = ("--prompt", "Hello there", "--max-new-tokens", "5", "--temperature", "0", "--json")
    with pytest.raises(CheckpointError, match="--tokenizer"):
        mm("chat", path, *say)
    given = json.loads(mm("chat", path, *say, "--tokenizer", gpt2))["ids"]
    assert len(given) == 5 and max(given) < 50257
    report = mm("eval", path, "--data", tmp_path / "text.txt", "--tokenizer", gpt2, "--longest", "64", "--out",
                tmp_path / "eval", "--json")
    result = json.loads(report)["results"][0]
    assert result["model_type"] == "memory_mosaics_v1" and 0 < result["loss"] < 40 and result["by_position"]
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(gpt2 / name, tmp_path)
    assert json.loads(mm("chat", path, *say))["ids"] == given
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).unlink()
    mm("convert", path, tmp_path / "hf", "--tokenizer", gpt2)
    assert json.loads(mm("chat", tmp_path / "hf", *say))["ids"] == given
    assert json.loads(mm("chat", tmp_path / "hf", *say, "--without", "contextual"))["ids"] != given

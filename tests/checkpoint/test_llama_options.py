"""Llamas as Hugging Face's library writes them, with every option that is read, against that library."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmcore
from mmcore.checkpoint.convert import convert_checkpoint
from mmcore.checkpoint.formats import open_checkpoint
from mmcore.errors import CheckpointError
from tests.helpers.real_data import DATA, needs_data

transformers = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 10_000.0}  # fmt: skip
OPTIONS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10_000.0}},
    "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "head_dim": {"head_dim": 20, "num_key_value_heads": 2},
    "all": {"rope_parameters": LLAMA3 | {"rope_theta": 500_000.0}, "head_dim": 16, "num_key_value_heads": 2,
            "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
}  # fmt: skip
TOKENS = (torch.arange(96) * 37 % 61).view(2, 48)


def make(folder, options, dtype=torch.float32, **saving):
    """A random Llama of the library's own, saved by it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 128, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, **options,
    })  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    model.save_pretrained(folder, **saving)
    return model


@torch.no_grad()
def theirs(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(TOKENS).logits


@torch.no_grad()
def ours(path):
    return mmcore.load_model(path, dtype=torch.float32)(TOKENS)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_equal_the_librarys(tmp_path, options):
    """Read directly, and after a tour through our formats back to the library."""
    make(tmp_path / "hf", options, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    expected = theirs(tmp_path / "hf")
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours(tmp_path / "hf"), expected, rtol=0, atol=1e-5)
    for source, target, to in (("hf", "m.pt", "torch"), ("m.pt", "run", "train"), ("run", "back", "hf")):
        assert convert_checkpoint(tmp_path / source, tmp_path / target, to=to).largest_difference == 0
    assert torch.equal(theirs(tmp_path / "back"), expected)
    torch.testing.assert_close(ours(tmp_path / "m.pt"), expected, rtol=0, atol=1e-5)


def test_a_bf16_model_stays_one(tmp_path):
    make(tmp_path / "hf", {"num_key_value_heads": 2}, dtype=torch.bfloat16)
    certificate = convert_checkpoint(tmp_path / "hf", tmp_path / "out")
    assert certificate.dtype == "bfloat16" and not certificate.rounded
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    torch.testing.assert_close(ours(tmp_path / "out"), theirs(tmp_path / "hf"), rtol=0, atol=1e-5)


def test_a_tied_classifier_that_is_in_the_file_too(tmp_path):
    make(tmp_path / "hf", {"tie_word_embeddings": True})
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(ours(tmp_path / "hf"), theirs(tmp_path / "hf"), rtol=0, atol=1e-5)
    convert_checkpoint(tmp_path / "hf", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="ties lm_head.weight to model.embed_tokens.weight, but the two differ"):
        convert_checkpoint(tmp_path / "hf", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_the_librarys_state_dict_as_a_pt_file(tmp_path):
    """torch.save(model.state_dict()) beside config.json; a tied one has the classifier as an alias."""
    for tied in (False, True):
        folder = tmp_path / str(tied)
        model = make(folder, {"tie_word_embeddings": tied, "num_key_value_heads": 2})
        torch.save(model.state_dict(), folder / "state.pt")
        torch.testing.assert_close(ours(folder / "state.pt"), theirs(folder), rtol=0, atol=1e-5)
        convert_checkpoint(folder, tmp_path / f"{tied}.pt", to="torch")
        read = torch.load(tmp_path / f"{tied}.pt", weights_only=True)
        model.load_state_dict(read["model"])  # strict: every name is there


def test_rotary_scalings_that_are_not_known_are_refused(tmp_path):
    for kind, more in (("dynamic", {"factor": 2.0}), ("yarn", {"factor": 2.0}), ("longrope", {"factor": 2.0})):
        folder = tmp_path / kind
        make(folder, {})
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] = {"rope_type": kind, "rope_theta": 1e4, **more}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"rope_type '{kind}', and only linear and llama3"):
            open_checkpoint(folder)


# -- the hub's cache -------------------------------------------------------------------------------------------


def hub_cache(folder, model):
    """models--x--y/snapshots/<revision>/* -> ../../blobs/<hash>, as huggingface_hub lays it out; the snapshot."""
    snapshot, blobs = folder / "models--x--y/snapshots" / ("a" * 40), folder / "models--x--y/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        name = f"{number:064x}" if file.suffix == ".safetensors" else f"{number:040x}"
        shutil.copy(file, blobs / name)
        os.symlink(f"../../blobs/{name}", snapshot / file.name)
    return snapshot


def test_a_snapshot_of_the_hubs_cache(tmp_path):
    make(tmp_path / "hf", {}, max_shard_size="20KB")
    snapshot = hub_cache(tmp_path, tmp_path / "hf")
    torch.testing.assert_close(ours(snapshot), theirs(tmp_path / "hf"), rtol=0, atol=1e-5)
    assert convert_checkpoint(snapshot, tmp_path / "out").largest_difference == 0
    os.symlink(snapshot, tmp_path / "shortcut")  # the folder that the user names may be reached by a link
    assert open_checkpoint(tmp_path / "shortcut").config == open_checkpoint(snapshot).config


def test_no_other_link_is_followed(tmp_path):
    make(tmp_path / "hf", {})
    snapshot = hub_cache(tmp_path, tmp_path / "hf")
    weights, blobs = snapshot / "model.safetensors", tmp_path / "models--x--y/blobs"
    secret = tmp_path / ("b" * 64)
    shutil.copy(tmp_path / "hf/model.safetensors", secret)
    os.symlink(secret, blobs / ("c" * 64))
    (blobs / "plain-name").write_bytes(secret.read_bytes())
    for text in (str(secret), f"../../../{'b' * 64}", f"../../blobs/../../{'b' * 64}", f"../../blobs/{'c' * 64}",
                 "../../blobs/plain-name", f"../../blobs/{'d' * 64}", "../../blobs", f"../..//blobs/{0:064x}"):  # fmt: skip
        weights.unlink()
        os.symlink(text, weights)
        with pytest.raises(CheckpointError, match="is a link|is missing|is not a file"):
            open_checkpoint(snapshot)
    elsewhere = tmp_path / "folder"
    elsewhere.mkdir()
    for file in snapshot.iterdir():
        os.symlink(os.readlink(file), elsewhere / file.name)
    with pytest.raises(CheckpointError, match="is a link|is missing"):
        open_checkpoint(elsewhere)


def test_blobs_that_are_a_link_themselves(tmp_path):
    make(tmp_path / "hf", {})
    snapshot = hub_cache(tmp_path, tmp_path / "hf")
    blobs = tmp_path / "models--x--y/blobs"
    blobs.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", blobs)
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(snapshot)


# -- a real model ----------------------------------------------------------------------------------------------


@needs_data("models/stories260K")
def test_stories260K_by_both_routes(tmp_path):
    """llama2.c's file in mmcore, and its conversion in transformers: logits to 1e-5, the same greedy text.

    To 1e-5 in float64. In fp32 the library itself is 2e-5 away from float64 loops, with logits up to 22, so there
    the two are compared to 2e-6 of the largest.
    """
    source = DATA / "models/stories260K/stories260K.bin"
    convert_checkpoint(source, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[1, *(int(i) * 131 % 509 + 3 for i in range(1, 120))]])
    with torch.no_grad():
        expected = model(tokens).logits
        atol = 2e-6 * float(expected.abs().max())
        torch.testing.assert_close(mmcore.load_model(source)(tokens), expected, rtol=0, atol=atol)
        wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
        exact = mmcore.load_model(source, dtype=torch.float64)(tokens)
        torch.testing.assert_close(exact, wide(tokens).logits, rtol=0, atol=1e-5)
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False, pad_token_id=0)[0, 1:].tolist()
    assert list(mmcore.generate(mmcore.load_model(source), [1], max_new_tokens=200)) == ids
    text = mmcore.load_tokenizer(source).decode(ids)
    assert text == mmcore.load_tokenizer(tmp_path / "out").decode(ids)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")

"""`mm convert`: the result is the same model, or there is no result."""

import json
import os

import pytest
import torch
import typer
from typer.testing import CliRunner

from mmcli.convert import convert, parse_size
from mmcore.errors import CheckpointError, ConfigError
from tests.checkpoint.small import LLAMA, MOSAIC, TIED, save, weights
from tests.helpers.real_data import DATA, needs_data

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(convert)


def run(*arguments):
    """The output of `mm convert`; errors come out as exceptions, which mmcli/app.py turns into a line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2**31), ("1.5kb", 1500),
                                        ("1000", 1000), ("7B", 7)])  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 lightyears", "0", "5IB"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="--max-shard-size"):
        parse_size(text)


def test_the_table_of_formats():
    rows = {row.pop("name"): row for row in json.loads(run("--list", "--json"))}
    assert {"training", "exported", "hf-llama", "torch", "llama2c"} <= set(rows)
    assert all(set(row) == {"what", "can", "carries", "lost"} and all(row.values()) for row in rows.values())
    table = run("--list")
    assert all(name in table for name in rows) and "carries" in table and "lost" in table


@pytest.mark.parametrize("arguments, words", [
    ([], "needs SRC and DST"), (["a"], "needs SRC and DST"), (["a", "b", "--to", "gguf"], "--to is 'gguf': choose one of hf, train, torch"),
    (["a", "b", "--dtype", "int4"], "--dtype is 'int4': choose one of"),
])  # fmt: skip
def test_wrong_options(arguments, words):
    with pytest.raises(ConfigError, match=words):
        run(*arguments)


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        run(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("config", [MOSAIC, LLAMA, TIED], ids=["mosaic", "llama", "tied"])
def test_a_run_becomes_an_exported_folder(tmp_path, config):
    import mmcore

    save(tmp_path / "run", 5, config=config)
    output = run(tmp_path / "run", tmp_path / "out", "--max-shard-size", "5KB")
    assert "largest logit difference" in output and "mm chat" in output
    certificate = json.loads((tmp_path / "out/certificate.json").read_text())
    assert certificate["largest_difference"] == 0 and certificate["dtype"] == "float32"
    # 64 tokens more than the delay of the long-term memories, so that those are read
    assert certificate["tokens"] == (128 if config.model_type == "memory_mosaics_v2" else 64)
    assert certificate["tensors"] == len(weights(config)) and not certificate["rounded"] and certificate["tolerance"] == 0
    assert certificate["source_format"] == "training" and certificate["versions"]["torch"] == torch.__version__
    assert set(certificate["result_files"]) == set(os.listdir(tmp_path / "out")) - {"certificate.json"}
    assert (tmp_path / "out/tokenizer.model").exists() and not (tmp_path / "out/optimizer.safetensors").exists()
    loaded = mmcore.load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(config, 5).items())
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_within_their_tolerance(tmp_path, dtype):
    save(tmp_path / "run", 5)
    certificate = json.loads(run(tmp_path / "run", tmp_path / "out", "--dtype", dtype, "--json"))
    assert 0 < certificate["largest_difference"] <= certificate["tolerance"] < 0.1 * certificate["largest_logit"]
    assert certificate["rounded"]


def test_a_result_that_differs_is_not_kept(tmp_path, monkeypatch):
    from mmcore.checkpoint import certificate as module

    save(tmp_path / "run", 5)
    monkeypatch.setitem(module.ROUNDING, torch.bfloat16, 1e-9)
    with pytest.raises(CheckpointError, match="the result's logits differ from the source's by"):
        run(tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert not (tmp_path / "out").exists() and os.listdir(tmp_path) == ["run"]


def test_the_source_is_never_the_target(tmp_path):
    save(tmp_path / "run", 5)
    run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is the source itself"):
        run(tmp_path / "out", tmp_path / "out", "--force")
    with pytest.raises(CheckpointError, match="is there already"):
        run(tmp_path / "run", tmp_path / "out")
    run(tmp_path / "run", tmp_path / "out", "--force", "--dtype", "float16")


@needs_data("models/stories260K")
def test_stories260K_becomes_a_folder_with_its_tokenizer(tmp_path):
    import mmcore

    run(DATA / "models/stories260K/stories260K.bin", tmp_path / "out")
    certificate = json.loads((tmp_path / "out/certificate.json").read_text())
    assert certificate["largest_difference"] == 0 and certificate["source_format"] == "llama2c"
    before = mmcore.load_tokenizer(DATA / "models/stories260K/stories260K.bin")
    after = mmcore.load_tokenizer(tmp_path / "out")
    text = "Lily went to the park — 😀"
    assert after.encode(text) == before.encode(text) and (after.bos_id, after.eos_id) == (1, 2)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    from mmcli.app import run as app_run
    from mmcore.checkpoint import tensorfile

    save(tmp_path / "run", 5)
    original = tensorfile._write_shard

    def write(path, *arguments):
        if "00003" in path.name:
            raise KeyboardInterrupt
        return original(path, *arguments)

    monkeypatch.setattr(tensorfile, "_write_shard", write)
    command = ["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--max-shard-size", "4KB"]
    assert app_run(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(tensorfile, "_write_shard", original)
    assert app_run(command) == 0 and sorted(os.listdir(tmp_path)) == ["out", "run"]
    assert app_run(["convert", "--verify", str(tmp_path / "out")]) == 0
    assert "equal to the last bit" in capsys.readouterr().out


def test_verify_as_json(tmp_path):
    save(tmp_path / "run", 5)
    run(tmp_path / "run", tmp_path / "m.pt", "--to", "torch")
    found = json.loads(run("--verify", tmp_path / "m.pt", "--json"))
    assert found["logits"] == "equal" and found["source"] == "compared again" and found["files"] == 1


def test_what_to_run_next(tmp_path):
    save(tmp_path / "run", 5)
    assert "--resume --set checkpoint.folder=" in run(tmp_path / "run", tmp_path / "new", "--to", "train")
    assert "checkpoints/step-000005/recipe.yaml" in run(tmp_path / "run", tmp_path / "new2", "--to", "train")
    run(tmp_path / "run", tmp_path / "out")
    assert "mm pretrain RECIPE --resume" in run(tmp_path / "out", tmp_path / "new3", "--to", "train")

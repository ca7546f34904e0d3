"""`mm convert` on what should not be converted: one sentence, exit 2, nothing left, nothing run, nothing lost."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmcli.app import run
from mmcore.checkpoint import disk
from mmcore.checkpoint.formats import open_checkpoint, write_exported
from tests.checkpoint.small import LLAMA, MOSAIC, same, save, weights
from tests.checkpoint.test_torchfile import Payload

TARGETS = {"hf": "out", "train": "run", "torch": "model.pt"}


@pytest.fixture
def refused(tmp_path, capsys):
    """Convert `source`; the one line that says why not. Nothing may appear in the folder of the test."""

    def convert(source, *options, to="hf"):
        before = sorted(os.listdir(tmp_path))
        status = run(["convert", str(source), str(tmp_path / TARGETS[to]), "--to", to, *options])
        err = capsys.readouterr().err
        assert status == 2, err
        assert err.startswith("mm: ") and err.count("\n") == 1 and "Traceback" not in err
        assert sorted(os.listdir(tmp_path)) == before
        return err

    return convert


@pytest.fixture
def source(tmp_path):
    return write_exported(tmp_path / "source", MOSAIC, weights(), max_shard_bytes=4000)


@pytest.mark.parametrize("to", TARGETS)
def test_wrong_tensors_are_all_listed(tmp_path, refused, to):
    source = write_exported(tmp_path / "source", LLAMA, weights(LLAMA))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = torch.zeros(37, 17)
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(24, 16)
    save_file(tensors, source / "model.safetensors")
    said = refused(source, to=to)
    for words in ("2 missing (model.layers.1.mlp.up_proj.weight, model.norm.weight)", "1 misshapen (lm_head.weight",
                  "1 unexpected (model.layers.2.mlp.up_proj.weight)"):  # fmt: skip
        assert words in said


def test_a_name_given_twice_in_one_header(tmp_path, refused):
    source = write_exported(tmp_path / "source", LLAMA, weights(LLAMA))
    path = source / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().rstrip()
    name = '"model.norm.weight":'
    entry = text[text.index(name) :].split("}")[0] + "}"
    header = (text[:-1] + "," + entry + "}").encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert "the key model.norm.weight is given twice" in refused(source)


def test_the_same_tensor_in_two_shards(source, refused):
    first, second = sorted(source.glob("model-*"))[:2]
    save_file(load_file(first) | load_file(second), second)
    assert "and again in model-00002-of-" in refused(source)


@pytest.mark.parametrize("dtype", ["int4", 7, ["float32"], "load"])
def test_a_wrong_dtype_in_config(source, refused, dtype):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    assert "and must be one of float64, float32, bfloat16, float16" in refused(source)


def test_a_config_that_says_another_dtype_than_the_weights_have(tmp_path, source):
    from mmcore.checkpoint.convert import convert_checkpoint

    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    made = convert_checkpoint(source, tmp_path / "out")
    assert made.dtype == "float32" and "config.json says bfloat16, but its weights are float32" in made.notes[0]
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_indexes_that_lead_elsewhere(tmp_path, source, refused):
    outside = write_exported(tmp_path / "outside", MOSAIC, weights()) / "model.safetensors"
    index = source / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for place in ("../outside/model.safetensors", str(outside), "", "sub/model.safetensors", "..", 5):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {"model.norm.weight": place}}))
        assert "a shard must be a plain file name" in refused(source)
    os.symlink(outside, source / "link.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(good["weight_map"], "link.safetensors")}))
    assert "is a link, and links are not followed" in refused(source)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(good["weight_map"], "absent.safetensors")}))
    assert "is missing" in refused(source)


def test_headers_cut_short_and_oversized(source, refused):
    path = sorted(source.glob("model-*"))[1]
    good = path.read_bytes()
    for data in (b"", good[:7], good[:40], good[:-1], good + b"x", (2**40).to_bytes(8, "little") + good[8:],
                 (200_000_000).to_bytes(8, "little") + bytes(100)):  # fmt: skip
        path.write_bytes(data)
        said = refused(source)
        assert "cut short" in said or "damaged header" in said


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path, refused, capsys, value, to):
    tensors = weights()
    tensors["model.layers.1.out_proj.weight"][3, 5] = value
    source = tmp_path / "source"
    write_exported(source, MOSAIC, tensors, allow_nonfinite=True)
    assert "model.layers.1.out_proj.weight holds NaN or infinity" in refused(source, to=to)
    target = tmp_path / TARGETS[to]
    assert run(["convert", str(source), str(target), "--to", to, "--allow-nan"]) == 0
    assert "not finite" in capsys.readouterr().out
    read = open_checkpoint(target, allow_nonfinite=True).tensors["model.layers.1.out_proj.weight"]
    assert not torch.isfinite(read[3, 5]) and torch.isfinite(read).sum() == read.numel() - 1
    assert run(["convert", "--verify", str(target)]) == 0


def test_overflow_is_refused_even_with_nan_allowed(tmp_path, refused):
    tensors = weights()
    tensors["lm_head.weight"][0, 0], tensors["lm_head.weight"][0, 1] = 1e9, float("nan")
    source = tmp_path / "source"
    write_exported(source, MOSAIC, tensors, allow_nonfinite=True)
    assert "lm_head.weight overflows in float16" in refused(source, "--dtype", "float16", "--allow-nan")


@pytest.mark.parametrize("to", TARGETS)
def test_a_pickled_payload_is_never_executed(tmp_path, refused, to):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_bytes((write_exported(tmp_path / "x", LLAMA, weights(LLAMA)) / "config.json").read_bytes())
    torch.save(weights(LLAMA) | {"payload": Payload(tmp_path / "executed")}, folder / "pytorch_model.bin")
    assert "which could run code" in refused(folder, to=to)
    assert "which could run code" in refused(folder / "pytorch_model.bin", to=to)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("config", [MOSAIC, LLAMA], ids=["mosaic", "llama"])
@pytest.mark.parametrize("to", TARGETS)
def test_code_planted_in_a_folder_is_never_executed(tmp_path, config, to):
    """Neither by conversion nor carried along; a mosaic's folder ships this project's own modules and names only those."""
    source = write_exported(tmp_path / "source", config, weights(config))
    values = json.loads((source / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Model", "AutoConfig": "configuration_evil.Config"}
    (source / "config.json").write_text(json.dumps(values))
    for name in ("modeling_evil", "modeling_memory_mosaics", "tokenization_evil", "__init__", "sitecustomize"):
        (source / f"{name}.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    target = tmp_path / TARGETS[to]
    assert run(["convert", str(source), str(target), "--to", to]) == 0
    assert not (tmp_path / "executed").exists()
    shipped = [path for path in tmp_path.rglob("*.py") if not path.is_relative_to(source)]
    assert bool(shipped) == (to == "hf" and config is MOSAIC)
    assert not any("executed" in path.read_text() for path in shipped)
    assert "evil" not in json.dumps(open_checkpoint(target).config_json)


# -- targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TARGETS)
def test_an_existing_target_is_kept_unless_forced(tmp_path, source, refused, to):
    target = tmp_path / TARGETS[to]
    assert run(["convert", str(source), str(target), "--to", to]) == 0
    assert "is there already: choose another name, or replace it with --force" in refused(source, to=to)
    other = write_exported(tmp_path / "other", MOSAIC, weights(seed=7))
    broken = write_exported(tmp_path / "broken", MOSAIC, weights(seed=8))
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-2:] = b"\x80\x7f"  # infinity
    (broken / "model.safetensors").write_bytes(data)
    refused(broken, "--force", to=to)
    assert same(weights(), open_checkpoint(target).tensors), "replaced only when the new one is whole"
    assert run(["convert", str(other), str(target), "--to", to, "--force"]) == 0
    assert same(weights(seed=7), open_checkpoint(target).tensors)
    assert run(["convert", "--verify", str(target)]) == 0


def test_force_never_removes_what_conversion_did_not_write(tmp_path, source, refused):
    save(tmp_path / "run", 5)  # a run that has trained
    assert "holds more than a converted checkpoint" in refused(source, "--force", to="train")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("x")
    assert "holds more than an exported checkpoint" in refused(source, "--force")
    (tmp_path / "model.pt").write_text("my own notes")
    assert "is no file of PyTorch's" in refused(source, "--force", to="torch")
    for name in ("run", "out"):
        assert list((tmp_path / name).iterdir())
    assert (tmp_path / "model.pt").read_text() == "my own notes"


@pytest.mark.parametrize("config, others", [(True, ["train.py"]), (True, ["README.md", "NOTES.txt"]), (False, ["config.json"])])
def test_force_keeps_folders_with_files_of_others(tmp_path, source, refused, config, others):
    """Beside an export, and in a folder that merely has a config.json of its own."""
    if config:
        assert run(["convert", str(source), str(tmp_path / "out")]) == 0
    (tmp_path / "out").mkdir(exist_ok=True)
    for name in others:
        (tmp_path / "out" / name).write_text("{}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "exported checkpoint" in refused(source, "--force")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_run_that_went_on_from_a_conversion_is_not_replaced(tmp_path, source, refused):
    assert run(["convert", str(source), str(tmp_path / "run"), "--to", "train"]) == 0
    save(tmp_path / "run", 5)
    assert "holds more than a converted checkpoint" in refused(source, "--force", to="train")


def test_source_and_target_may_not_lie_in_one_another(tmp_path, source, capsys):
    step = save(tmp_path / "trained", 5)
    for a, b in ((source, source), (source, source / "sub"), (step, tmp_path / "trained"), (step, step.parent)):
        assert run(["convert", str(a), str(b), "--force"]) == 2
        assert "the source" in capsys.readouterr().err
    assert same(weights(), open_checkpoint(source).tensors) and open_checkpoint(step)


def test_a_torch_target_must_be_called_one(source, tmp_path, capsys):
    assert run(["convert", str(source), str(tmp_path / "folder"), "--to", "torch"]) == 2
    assert "let its name end in .pt" in capsys.readouterr().err


# -- disks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk(tmp_path, source, refused, monkeypatch, to, existing):
    """Every write from the n-th on fails; a target that was there stays."""
    if existing:
        assert run(["convert", str(source), str(tmp_path / TARGETS[to]), "--to", to]) == 0
    options = ("--force",) if existing else ()
    for after in (0, 2, 5):
        left = after

        def full(path):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        with monkeypatch.context() as patch:
            fill_disk(patch, full)
            said = refused(source, *options, "--max-shard-size", "4KB", to=to)
        assert "the disk is full: free some space" in said
        assert ("is as it was" in said) == existing
    if existing:
        assert same(weights(), open_checkpoint(tmp_path / TARGETS[to]).tensors)


def fill_disk(patch, full):
    """Make `full(path)` run before each new file and each write to one."""
    original = disk.NewFile.write
    patch.setattr(disk.NewFile, "write", lambda self, data: (full("a file"), original(self, data))[1])
    from mmcore.checkpoint.formats import torchfile

    add = torchfile._add
    patch.setattr(torchfile, "_add", lambda *arguments: (full("a file"), add(*arguments))[1])


def test_a_folder_that_cannot_be_written(tmp_path, source, capsys):
    (tmp_path / "file").write_text("x")
    assert run(["convert", str(source), str(tmp_path / "file" / "out")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["file", "source"]

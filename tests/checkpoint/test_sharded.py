"""Checkpoints of several ranks: saved and resumed by real ones (sharded_driver.py), and damaged in every way."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmcore.checkpoint import manifest, sharded
from mmcore.checkpoint.convert import convert_checkpoint
from mmcore.checkpoint.disk import hash_file
from mmcore.checkpoint.formats import open_checkpoint
from mmcore.checkpoint.load import load_model
from mmcore.checkpoint.resolve import resolve_checkpoint
from mmcore.checkpoint.rows import held, written
from mmcore.checkpoint.store import load_state, save_checkpoint, whole_checkpoints
from mmcore.errors import CheckpointError
from tests.distributed import checkpoint_faults

pytestmark = pytest.mark.slow
CHECKS = [f"saved on {n}" for n in (1, 2, 3, 4)] + [f"resumed on {n}" for n in (1, 2, 3, 4)] + [
    "failures are shared", "a full disk is shared", "damage is agreed on"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the driver leaves: checkpoints of 1 to 4 ranks, of two steps each."""
    folder = tmp_path_factory.mktemp("made")
    command = [sys.executable, "-m", "tests.checkpoint.sharded_driver", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run of two ranks, to be damaged."""
    shutil.copytree(made / "two", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", CHECKS)
def test_real_ranks(made, name):
    results = json.loads((made / "results.json").read_text())
    assert set(results) == set(CHECKS)
    if results[name].startswith("skipped"):
        pytest.skip(results[name])
    assert results[name] == "ok", results[name]


# -- readers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "three", "four", "hybrid"])
def test_every_reader_takes_them(made, tmp_path, name):
    """Converted to a plain folder, the weights are those of one process bit for bit, and so are the model's."""
    plain = load_file(made / "one/checkpoints/step-000002/model.safetensors")
    convert_checkpoint(made / name, tmp_path / "out")
    converted = load_file(tmp_path / "out/model.safetensors")
    model = dict(load_model(made / name).named_parameters())
    assert plain.keys() == converted.keys() == model.keys()
    assert all(torch.equal(plain[key], converted[key]) and torch.equal(plain[key], model[key]) for key in plain)
    assert convert_checkpoint(made / name, tmp_path / "run", to="train", max_shard_bytes=4000).optimizer == "kept"
    before, after = (load_state(path / "checkpoints/step-000002") for path in (made / "one", tmp_path / "run"))
    assert after.state == before.state and after.model.keys() == before.model.keys()
    assert all(torch.equal(after.model[key], before.model[key]) for key in before.model)
    assert before.optimizer.keys() == after.optimizer.keys() != set()
    assert all(torch.equal(after.optimizer[key], before.optimizer[key]) for key in before.optimizer)
    assert len(open_checkpoint(made / name).weight_files) == (4 if name == "hybrid" else {"two": 2, "three": 3}.get(name, 4))


def test_any_rows_of_any_tensor(made):
    whole = load_state(made / "one/checkpoints/step-000002")
    for name in ("two", "three", "four", "hybrid"):
        state = load_state(made / name / "checkpoints/step-000002")
        for tensor in ("lm_head.weight", "exp_avg_sq.model.layers.1.out_proj.weight", "model.layers.0.long_term.value_mix"):
            expected = (whole.optimizer if tensor.startswith("exp") else whole.model)[tensor]
            for start, stop in ((0, 1), (0, 2), (1, 2), (0, len(expected)), (len(expected) // 3, len(expected)), (1, 1)):
                assert torch.equal(state.rows(tensor, start, stop), expected[start:stop])
                assert torch.equal(whole.rows(tensor, start, stop), expected[start:stop])


def test_saved_again_by_one_process_it_is_the_plain_folder(made, tmp_path):
    state = load_state(made / "three/checkpoints/step-000002")
    path = save_checkpoint(tmp_path, 2, model=state.model, optimizer=state.optimizer, state=state.state,
                           config=state.config_json, files={"recipe.yaml": b"name: toy\n"})  # fmt: skip
    before = made / "one/checkpoints/step-000002"
    assert {entry.name for entry in path.iterdir()} == {entry.name for entry in before.iterdir()}
    for file in ("model.safetensors", "optimizer.safetensors", "config.json", "trainer.json"):
        assert (path / file).read_bytes() == (before / file).read_bytes(), file


# -- damage ----------------------------------------------------------------------------------------------------


def shard(path: Path, part: str = "model", rank: int = 2) -> Path:
    return path / f"{part}-rank{rank:05d}-of-00002.safetensors"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def sealed(path: Path) -> None:
    """Make the manifest fit the files again, as someone would who means harm: only shards.json can tell then."""
    step, records = manifest.read_manifest(path)
    (path / manifest.NAME).unlink()
    manifest.write_manifest(path, step, {name: hash_file(path / name) for name in records if (path / name).exists()})


def edit(change):
    """A damage: `change` is applied to what shards.json says, and the manifest made to fit."""

    def apply(path: Path) -> None:
        index = path / sharded.NAME
        values = json.loads(index.read_text())
        change(values)
        index.write_text(json.dumps(values))
        sealed(path)

    return apply


def pieces(values, name="lm_head.weight"):
    return values["model"][name]["pieces"]


def another_world(path: Path) -> None:
    """A file of three ranks in a checkpoint of two, which the manifest names."""
    shutil.copy(shard(path), path / "model-rank00003-of-00003.safetensors")
    step, records = manifest.read_manifest(path)
    records["model-rank00003-of-00003.safetensors"] = hash_file(path / "model-rank00003-of-00003.safetensors")
    (path / manifest.NAME).unlink()
    manifest.write_manifest(path, step, records)


def other_rows(path: Path) -> None:
    """A shard that has a row less than shards.json says."""
    tensors = load_file(shard(path))
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, shard(path))
    sealed(path)


DAMAGES = {
    "a flipped bit": (lambda p: flip(shard(p)), "model-rank00002-of-00002.safetensors was altered"),
    "a flipped bit in the moments": (lambda p: flip(shard(p, "optimizer", 1)), "optimizer-rank00001.* was altered"),
    "a shard cut short": (lambda p: shard(p).write_bytes(shard(p).read_bytes()[:-1]), r"has \d+ bytes of \d+"),
    "a shard missing": (lambda p: shard(p).unlink(), "model-rank00002-of-00002.safetensors is missing"),
    "a shard that is a link": (lambda p: shard(p).rename(p.parent / "x") and shard(p).symlink_to(p.parent / "x"), "is a link"),
    "shards.json missing": (lambda p: (p / "shards.json").unlink(), "shards.json is missing"),
    "shards.json altered": (lambda p: flip(p / "shards.json"), "shards.json was altered"),
    "the shards of another step": (
        lambda p: shutil.copy(shard(p.parent / "step-000001"), shard(p)), "model-rank00002.* was altered"),
    "the files of another number of ranks": (another_world, "model-rank00003-of-00003.safetensors belongs to no tensor"),
    "a shard outside": (edit(lambda v: pieces(v)[1].update(file="../../step-000001/model-rank00002-of-00002.safetensors")),
                        "lm_head.weight lies in .*which is no file of this checkpoint's model"),
    "a shard of another number of ranks": (edit(lambda v: pieces(v)[1].update(file="model-rank00002-of-00003.safetensors")),
                                           "and the checkpoint is of 2 ranks"),
    "shards without a record": (edit(lambda v: v.update(ranks=3) or [
        piece.update(file=piece["file"].replace("of-00002", "of-00003")) for name in v["model"] for piece in pieces(v, name)
    ]), "which the manifest does not name"),
    "moments among the weights": (edit(lambda v: pieces(v)[1].update(file="optimizer-rank00002-of-00002.safetensors")),
                                  "which is no file of this checkpoint's model"),
    "pieces that overlap": (edit(lambda v: pieces(v)[1].update(start=18)), "pieces that overlap at row 19"),
    "pieces that leave a hole": (edit(lambda v: pieces(v)[1].update(start=20)), "pieces that leave a hole at row 19"),
    "a piece too few": (edit(lambda v: pieces(v).pop()), "has pieces of 19 rows and must have 37"),
    "a piece twice": (edit(lambda v: pieces(v).append(dict(pieces(v)[1]))), "pieces that overlap at row 37"),
    "no pieces": (edit(lambda v: pieces(v).clear()), "lm_head.weight has no pieces"),
    "rows that run backwards": (edit(lambda v: pieces(v)[0].update(start=19, stop=0)), "has a piece of the rows 19 to 0"),
    "rows that are no numbers": (edit(lambda v: pieces(v)[0].update(stop=True)), "has a piece of the rows 0 to True"),
    "more rows than there are": (edit(lambda v: pieces(v)[1].update(stop=38)), "has pieces of 38 rows and must have 37"),
    "a shard with fewer rows": (other_rows, "model-rank00002.* and shards.json say different things of lm_head.weight"),
    "another dtype": (edit(lambda v: v["model"]["lm_head.weight"].update(dtype="int32")), "say different things of lm_head"),
    "a dtype that is none": (edit(lambda v: v["model"]["lm_head.weight"].update(dtype="object")), "a wrong shape or dtype"),
    "a shape that is none": (edit(lambda v: v["model"]["lm_head.weight"].update(shape=[37, -16])), "a wrong shape or dtype"),
    "a tensor left out": (edit(lambda v: v["model"].pop("lm_head.weight")), "say different things of lm_head.weight"),
    "a tensor too many": (edit(lambda v: v["model"].update(extra=v["model"]["lm_head.weight"])), "different things of extra"),
    "no ranks": (edit(lambda v: v.update(ranks=0)), "does not describe the shards"),
    "no weights": (edit(lambda v: v.pop("model")), "does not describe the shards"),
    "a key given twice": (lambda p: (p / "shards.json").write_text('{"ranks": 2, "ranks": 3}') and sealed(p), "given twice"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_checkpoint_before_is_used(run, damage):
    apply, words = DAMAGES[damage]
    bad = run / "checkpoints/step-000002"
    apply(bad)
    skipped = []
    assert whole_checkpoints(run, skipped.append) == [run / "checkpoints/step-000001"]
    assert len(skipped) == 1 and "\n" not in skipped[0] and "step-000002" in skipped[0]
    assert re.search(words, skipped[0]), skipped[0]
    with pytest.raises(CheckpointError, match=words):
        resolve_checkpoint(bad)


@pytest.mark.parametrize("fault", checkpoint_faults.FAULTS, ids=lambda fault: fault.name)
def test_faults_of_the_table(run, fault):
    fault.cause(run)
    skipped = []
    whole = [path.name for path in whole_checkpoints(run, skipped.append)]
    if fault.said is not None:
        assert whole == ["step-000001"] and len(skipped) == 1 and fault.said in skipped[0]
    else:
        assert skipped == [] and whole[-1] == "step-000001"
        assert ("step-000002" in whole) == (fault.cause is not checkpoint_faults.unfinished_save)
    assert not (run / checkpoint_faults.VICTIM).exists()


def test_extra_files_do_no_harm_and_are_never_opened(run):
    """Strays of other numbers of ranks, a stale temporary folder, and a pickle that would run where DCP keeps its own."""
    path = run / "checkpoints/step-000002"
    shutil.copy(shard(path), path / "model-rank00001-of-00003.safetensors")
    (path / "model.safetensors").write_bytes(b"no tensors")
    victim = run / "pickle-was-run"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(victim),)

    for name in (".metadata", "__0_0.distcp"):
        (path / name).write_bytes(pickle.dumps(Payload()))
    stale = path.with_name("step-000003.tmp-" + "0" * 32)
    shutil.copytree(path, stale)
    code = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda name, arguments: opened.append(str(arguments[0])) if name == 'open' else None)\n"
        "import mmcore\n"
        "from mmcore.checkpoint.store import load_state, whole_checkpoints\n"
        "(newest, *_) = whole_checkpoints(sys.argv[1])\n"
        "state = load_state(newest)\n"
        "count = sum(tensor.numel() for part in (state.model, state.optimizer) for tensor in part.values())\n"
        "mmcore.load_model(sys.argv[1])\n"
        "opened = [name for name in opened if name.startswith(sys.argv[1])]\n"
        "assert any('shards.json' in name for name in opened)\n"
        "bad = ('.metadata', 'distcp', 'of-00003', '/model.safetensors', '.tmp-')\n"
        "assert not [name for name in opened if any(word in name for word in bad)], opened\n"
        "print(newest.name, count)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "step-000002" and not victim.exists()


def test_a_layout_that_is_no_rows_is_refused():
    class Placement:
        dim = 1

        def is_replicate(self):
            return False

    class Columns(torch.Tensor):
        placements = (type("Shard", (Placement,), {})(),)
        device_mesh = type("Mesh", (), {"get_coordinate": lambda self: [0], "size": lambda self, dimension: 2})()

    tensor = torch.zeros(4, 4).as_subclass(Columns)
    with pytest.raises(CheckpointError, match="shard it along dimension 0"):
        held("a", tensor)


def test_whole_tensors_of_several_ranks_are_written_once():
    tensors = {f"t{i}": torch.zeros(3) for i in range(7)}
    names = [list(written(tensors, rank, 3)) for rank in range(3)]
    assert sorted(name for part in names for name in part) == sorted(tensors) and all(names)

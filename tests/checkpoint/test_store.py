"""Training checkpoints: what is saved comes back, and the disk is changed in the right order."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmcore.checkpoint import disk, manifest
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.resolve import resolve_checkpoint
from mmcore.checkpoint.store import load_state, save_checkpoint, whole_checkpoints
from mmcore.errors import CheckpointError
from tests.checkpoint.small import ALL, MOSAIC, moments, same, save, weights


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_what_is_saved_comes_back(tmp_path, config):
    path = save(tmp_path, 12, config=config)
    assert path == tmp_path / "checkpoints" / "step-000012"
    assert whole_checkpoints(tmp_path) == [path]
    read = load_state(path, verify=True)
    assert read.step == 12 and read.config == config
    assert read.state == {"position": 12000, "loss": 1.5, "step": 12}
    assert same(weights(config, 12), read.model)
    assert same(moments(weights(config, 12), 12), read.optimizer)
    assert (path / "recipe.yaml").read_bytes() == b"name: test\n"
    assert read.config_json["dtype"] == "float32"


def test_files_are_what_the_contract_says(tmp_path):
    path = save(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json", "generation_config.json", "manifest.json", "model.safetensors", "optimizer.safetensors",
        "recipe.yaml", "tokenizer.model", "trainer.json",
    ]  # fmt: skip
    record = json.loads((path / "manifest.json").read_text())
    assert record["format_version"] == 1 and record["step"] == 1 and record["mm_version"]
    assert set(record["files"]) == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert json.loads((path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_shards(tmp_path):
    path = save(tmp_path, 3, shard_bytes=4000)
    assert len(list(path.glob("model-*.safetensors"))) > 2 and len(list(path.glob("optimizer-*.safetensors"))) > 4
    read = load_state(path, verify=True)
    assert same(weights(MOSAIC, 3), read.model)
    assert same(moments(weights(MOSAIC, 3), 3), read.optimizer)


def test_other_dtypes_and_layouts(tmp_path):
    model = weights(dtype=torch.bfloat16)
    model["model.layers.0.out_proj.weight"] = model["model.layers.0.out_proj.weight"].t().contiguous().t()
    path = save(tmp_path, 1, model=model)
    read = load_state(path)
    assert same(model, read.model) and read.config_json["dtype"] == "bfloat16"


def test_nothing_is_pickled(tmp_path):
    for path in save(tmp_path, 1).iterdir():
        assert path.suffix in (".json", ".safetensors", ".yaml", ".model")


# -- which are kept --------------------------------------------------------------------------------------------


def test_older_ones_go_once_the_new_one_is_whole(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_keep_last_0_keeps_all(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=0)
    assert len(names(tmp_path)) == 3


def test_the_one_resumed_from_is_never_removed(tmp_path):
    first = save(tmp_path, 1)
    for step in (2, 3, 4):
        save(tmp_path, step, keep_last=1, protect=[first])
    assert names(tmp_path) == ["step-000001", "step-000004"]


def test_later_steps_of_an_abandoned_branch_stay(tmp_path):
    save(tmp_path, 200)
    save(tmp_path, 100)
    save(tmp_path, 110, keep_last=1)
    assert names(tmp_path) == ["step-000110", "step-000200"]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-000002/model.safetensors").unlink()
    save(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]


def test_a_file_or_a_link_with_the_name_of_a_step_is_in_nobodys_way(tmp_path):
    checkpoints = save(tmp_path, 1).parent
    (checkpoints / "step-000002").write_text("notes")
    (checkpoints / "step-000003").symlink_to(tmp_path / "gone")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/model.safetensors").write_text("moved by its user")
    (checkpoints / "step-000004").symlink_to(tmp_path / "elsewhere")
    for step in (2, 3, 4):
        assert load_state(save(tmp_path, step, keep_last=0)).step == step
    (aside,) = [path for path in checkpoints.iterdir() if len(path.name) > len("step-000001")]
    assert aside.name.startswith("step-000002.old-") and aside.read_text() == "notes"
    assert (tmp_path / "elsewhere/model.safetensors").exists()
    save(tmp_path, 5, keep_last=1)
    assert aside.exists()


def test_strangers_in_the_folder_are_left_alone(tmp_path):
    save(tmp_path, 1)
    strangers = ["notes", "step-1", "step-000001-copy", "step-abc", "latest"]
    for name in strangers:
        (tmp_path / "checkpoints" / name).mkdir()
    save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == sorted([*strangers, "step-000002"])


# -- saving a step again ---------------------------------------------------------------------------------------


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, seed=1)
    path = save(tmp_path, 5, seed=2)
    assert names(tmp_path) == ["step-000005"] and same(weights(MOSAIC, 2), load_state(path, verify=True).model)


def test_a_step_that_cannot_be_saved_again_stays(tmp_path):
    path = save(tmp_path, 5, seed=1)
    model = weights(MOSAIC, 2)
    model["lm_head.weight"][3, 4] = float("nan")
    with pytest.raises(CheckpointError, match="tensor lm_head.weight holds NaN or infinity and is never saved"):
        save(tmp_path, 5, model=model)
    assert names(tmp_path) == ["step-000005"] and same(weights(MOSAIC, 1), load_state(path, verify=True).model)


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(tmp_path, bad):
    optimizer = moments(weights())
    optimizer["exp_avg_sq.model.norm.weight"][0] = bad
    with pytest.raises(CheckpointError, match="exp_avg_sq.model.norm.weight holds NaN or infinity"):
        save(tmp_path, 1, optimizer=optimizer)
    assert names(tmp_path) == []


def test_weights_that_do_not_fit_the_configuration_are_refused(tmp_path):
    model = weights()
    model["model.norm.weight"] = torch.zeros(3)
    del model["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"the model to save .*1 missing \(lm_head.weight\); 1 misshapen"):
        save(tmp_path, 1, model=model)
    assert not (tmp_path / "checkpoints").exists()


def test_moments_of_nothing_are_refused(tmp_path):
    optimizer = moments(weights())
    optimizer["exp_avg.nothing"] = torch.zeros(1)
    optimizer["momentum.lm_head.weight"] = torch.zeros(1)
    optimizer["exp_avg.model.norm.weight"] = torch.zeros(2)
    del optimizer["exp_avg.lm_head.weight"]
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, 1, optimizer=optimizer)
    for part in ("exp_avg.nothing belongs to no weight", "momentum.lm_head.weight belongs", "is [2] and must be [16]",
                 "exp_avg_sq.lm_head.weight is without its other moment"):  # fmt: skip
        assert part in str(caught.value)


def test_weights_that_never_moved_need_no_moments(tmp_path):
    optimizer = {name: tensor for name, tensor in moments(weights()).items() if not name.endswith("norm.weight")}
    path = save(tmp_path, 1, optimizer=optimizer)
    assert same(optimizer, load_state(path).optimizer)
    path = save(tmp_path, 2, optimizer={})
    assert dict(load_state(path).optimizer) == {}


@pytest.mark.parametrize("state", [{"loss": float("nan")}, {"a": object()}, {"t": torch.zeros(1)}])
def test_state_that_is_no_json_is_refused(tmp_path, state):
    with pytest.raises(CheckpointError, match="state cannot be written as JSON"):
        save(tmp_path, 1, state=state)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_files_with_odd_names_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="plain file name"):
        save(tmp_path, 1, files={name: b""})
    assert names(tmp_path) == []


def test_a_file_to_copy_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(CheckpointError, match="is a link"):
        save(tmp_path, 1, files={"tokenizer.model": tmp_path / "link"})
    path = save(tmp_path, 1, files={"tokenizer.model": tmp_path / "real"})
    assert (path / "tokenizer.model").read_bytes() == b"x"


# -- the order of things on the disk ---------------------------------------------------------------------------


def test_everything_is_synced_before_the_name_and_purged_after(tmp_path, monkeypatch):
    save(tmp_path, 1)
    log, paths = [], {}

    def record(name):
        original = getattr(os, name)

        def wrapper(*arguments, **options):
            result = original(*arguments, **options)
            if name == "open":
                paths[result] = Path(arguments[0])
            subject = paths.get(arguments[0], arguments[0])
            log.append((name, Path(subject), *map(Path, arguments[1:2] if name == "rename" else ())))
            return result

        monkeypatch.setattr(os, name, wrapper)

    for name in ("open", "write", "fsync", "rename", "unlink", "rmdir", "mkdir"):
        record(name)
    final = save(tmp_path, 2, keep_last=1, shard_bytes=4000)
    monkeypatch.undo()

    publish = next(i for i, entry in enumerate(log) if entry[0] == "rename" and entry[-1] == final)
    temporary = log[publish][1]
    written = [entry[1] for entry in log if entry[0] == "write"]
    assert {path.name for path in written} == {path.name for path in final.iterdir()}
    for path in set(written):
        last_write = max(i for i, entry in enumerate(log) if entry[:2] == ("write", path))
        sync = max(i for i, entry in enumerate(log) if entry[:2] == ("fsync", path))
        assert last_write < sync < publish
        if path.name != manifest.NAME:
            assert sync < log.index(("write", temporary / manifest.NAME)), "the manifest comes last"
    assert log[publish - 1] == ("fsync", temporary), "the folder is durable before it gets its name"
    after = [entry for entry in log[publish + 1 :] if entry[0] != "open"]
    assert after[0] == ("fsync", final.parent), "the name is durable"
    assert not any(entry[0] in ("unlink", "rmdir") for entry in log[:publish]), "nothing goes before that"
    assert any(entry[0] == "unlink" for entry in after) and names(tmp_path) == ["step-000002"]


def test_stale_folders_of_dead_writers_go_and_living_ones_stay(tmp_path):
    save(tmp_path, 1)
    stale = disk.temporary_name(tmp_path / "checkpoints" / "step-000002")
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    with disk.new_folder(tmp_path / "checkpoints" / "step-000009") as living:
        (living / "x").write_bytes(b"x")
        save(tmp_path, 3)
        assert living.exists() and not stale.exists()
    assert names(tmp_path) == ["step-000001", "step-000003", "step-000009"]


def test_a_checkpoint_that_stepped_aside_is_found_and_gets_its_name_back(tmp_path):
    path = save(tmp_path, 7, seed=1)
    aside = disk.temporary_name(path, "old")
    path.rename(aside)
    assert whole_checkpoints(tmp_path) == [aside] and resolve_checkpoint(tmp_path) == aside
    assert load_state(aside).step == 7
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-000007", "step-000008"]


def test_files_are_private_to_no_one(tmp_path):
    """Readable as the umask says, not as a temporary file's 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for path in save(tmp_path, 1).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


# -- disks that refuse -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB. The four checkpoints of a test do not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_earlier_checkpoints(small_disk):
    saved = []
    with pytest.raises(CheckpointError, match="the disk is full.*earlier checkpoints are untouched"):
        for step in range(1, 10):
            saved.append(save(small_disk, step))
    assert saved and whole_checkpoints(small_disk) == saved[::-1]
    assert names(small_disk) == [path.name for path in saved], "no temporary folder is left"
    shutil.rmtree(saved.pop(0))
    saved.append(save(small_disk, 99))  # once there is room the run can save again
    assert whole_checkpoints(small_disk) == saved[::-1]


def test_a_full_disk_while_a_step_is_saved_again(small_disk):
    path = save(small_disk, 1, seed=1)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 40_000))
    with pytest.raises(CheckpointError, match="the disk is full"):
        save(small_disk, 1, seed=2)
    assert names(small_disk) == ["step-000001"] and same(weights(MOSAIC, 1), load_state(path, verify=True).model)


def test_a_read_only_disk(small_disk):
    save(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="no permission to write there"):
        save(small_disk, 2)
    assert len(whole_checkpoints(small_disk)) == 1


def test_no_permission(tmp_path):
    """As a user who is not root, since root may write anywhere."""
    save(tmp_path, 1)
    (tmp_path / "checkpoints").chmod(0o555)
    script = (
        "import os, sys; from pathlib import Path; from tests.checkpoint.small import save\n"
        "from mmcore.errors import CheckpointError\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "try: save(Path(sys.argv[1]), 2)\n"
        "except CheckpointError as error: print(error)\n"
    )
    for folder in [tmp_path, *tmp_path.parents][:3]:  # let that user reach the folder
        folder.chmod(folder.stat().st_mode | 0o055)
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "no permission to write there: change the permissions" in run.stdout, run.stderr
    assert names(tmp_path) == ["step-000001"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(tmp_path, 1)


def test_a_failing_write_and_an_interrupt_leave_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    failing = OSError(5, "Input/output error")
    for error, expected in ((failing, CheckpointError), (KeyboardInterrupt(), KeyboardInterrupt)):
        real, count = os.write, iter(range(10**6))

        def write(descriptor, data, real=real, count=count, error=error):
            if next(count) == 5:
                raise error
            return real(descriptor, data)

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(expected):
            save(tmp_path, 2)
        monkeypatch.undo()
        assert names(tmp_path) == ["step-000001"]


def test_config_is_checked_before_anything_is_written(tmp_path):
    values = config_json(MOSAIC, torch.float32) | {"num_attention_heads": 3}
    with pytest.raises(CheckpointError, match="does not divide into 3 heads"):
        save_checkpoint(tmp_path, 1, model=weights(), optimizer={}, state={}, config=values)
    assert not (tmp_path / "checkpoints").exists()

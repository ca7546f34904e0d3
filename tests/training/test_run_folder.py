"""The run folder: what may change between sessions, who may write where."""

import dataclasses
import errno
import json
import os

import pytest
import yaml

from mmcli.launch import begun_since_launch
from mmcore.errors import CheckpointError, ConfigError, HardwareError
from mmcore.training.run_folder import RunFolder, check_same_recipe, disk_errors, environment, recipe_text, replace_text
from tests.helpers.tiny_run import tiny_recipe


def compare(before, now):
    """As on resume: the recipe before has been through YAML."""
    return check_same_recipe(yaml.safe_load(recipe_text(before)), now.as_dict(), "run/checkpoints/step-000004")


def test_the_same_recipe_passes_without_notices(tmp_path):
    assert compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path)) == []


def test_every_changed_key_is_named_with_both_values(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path, weight_decay=0.2, batch_size=6, micro_batch_size=3))
    text = str(caught.value)
    assert "training.weight_decay was 0.1 and is now 0.2" in text
    assert "training.batch_size was 4 and is now 6" in text
    assert "micro_batch_size" not in text and "step-000004" in text and "checkpoint.folder" in text


def test_a_change_of_length_is_allowed_and_said(tmp_path):
    notices = compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path, steps=20))
    assert notices == ["the run's length changes from 8 steps to 20 steps: the cosine now ends there"]
    notices = compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path, steps=None, tokens=2e4))
    assert notices == ["the run's length changes from 8 steps to 2e+04 tokens: the cosine now ends there"]
    assert compare(tiny_recipe(tmp_path, schedule="constant"), tiny_recipe(tmp_path, schedule="constant", steps=9)) == []


def test_what_is_written_and_where_it_runs_may_change(tmp_path):
    free = {"log_every": 5, "validation_every": 7, "validation_tokens": 1e3}
    assert compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path, **free)) == []
    (notice,) = compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path, micro_batch_size=4, device="auto"))
    assert notice.startswith("training.micro_batch_size, training.device changed")


def test_what_a_diverging_run_is_told_to_change_may_change_and_is_said(tmp_path):
    changes = {"learning_rate": 1e-4, "warmup_steps": 4, "gradient_clip": 0.5, "precision": "bf16"}
    assert compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path, **changes)) == [
        "training.learning_rate was 0.003 and is now 0.0001", "training.warmup_steps was 2 and is now 4",
        "training.gradient_clip was 1.0 and is now 0.5", "training.precision was 'fp32' and is now 'bf16'",
    ]  # fmt: skip


def test_a_recipe_of_an_earlier_version_has_the_defaults_of_the_keys_that_came_since(tmp_path):
    before, now = tiny_recipe(tmp_path).as_dict(), tiny_recipe(tmp_path)
    for name in ("adaptive_bandwidth", "gated_keys", "v1"):
        del before["model"][name]
    del before["training"]["adam_eps"], before["distributed"]
    assert check_same_recipe(before, now.as_dict(), "x") == []
    ablated = dataclasses.replace(now, model=dataclasses.replace(now.model, gated_keys=False))
    with pytest.raises(CheckpointError, match=r"\(model.gated_keys was True and is now False\)"):
        check_same_recipe(before, ablated.as_dict(), "x")
    with pytest.raises(CheckpointError, match="model.of_a_later_version was 3 and is now None"):
        check_same_recipe(before | {"model": before["model"] | {"of_a_later_version": 3}}, now.as_dict(), "x")


def test_a_used_folder_is_refused_with_the_remedies(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.refuse_if_used()
    (run.checkpoints / "step-000004").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already holds checkpoints: go on with --resume, start over with --overwrite"):
        run.refuse_if_used()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        RunFolder(tmp_path / "run").check_writable()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="no permission to write"):
        RunFolder(tmp_path / "run").check_writable()
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_checkpoints_without_permission(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints").chmod(0o500)
    with pytest.raises(ConfigError, match="no permission to write .*run/checkpoints: choose another folder"):
        RunFolder(tmp_path / "run").check_writable()


def test_something_else_in_the_place_of_the_checkpoints(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.checkpoints.write_text("")
    with pytest.raises(ConfigError, match="run/checkpoints is not a folder"):
        run.check_writable()
    run.checkpoints.unlink()
    run.checkpoints.symlink_to(tmp_path / "an unmounted disk")
    with pytest.raises(ConfigError, match="run/checkpoints is a link to nothing"):
        run.check_writable()
    (tmp_path / "an unmounted disk").mkdir()
    run.check_writable()


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, HardwareError, "the disk is full at x: free some space and go on with --resume"),
        (errno.EACCES, ConfigError, "no permission to write x"),
        (errno.EROFS, ConfigError, "cannot write x"),
        (errno.EFBIG, HardwareError, "x may not grow further: raise the limit on the size of files .* go on with --resume"),
        (errno.ENOENT, ConfigError, "x cannot be written, since a folder on the way to it is gone: put it back"),
    ],
)
def test_what_a_disk_refuses_becomes_a_sentence(number, kind, words):
    with pytest.raises(kind, match=words), disk_errors("x"):
        raise OSError(number, os.strerror(number))


def test_other_errors_of_the_disk_pass():
    with pytest.raises(OSError, match="Input/output"), disk_errors("x"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_identity_keeps_the_environments_of_earlier_sessions(tmp_path):
    run, recipe = RunFolder(tmp_path / "run"), tiny_recipe(tmp_path)
    for _ in range(3):
        run.write_identity(recipe, {"identity": "abc"})
    written = json.loads((run.path / "environment.json").read_text())
    assert len(written["earlier"]) == 2 and "earlier" not in written["earlier"][0]
    assert yaml.safe_load(run.recipe.read_text()) == recipe.as_dict()
    assert json.loads((run.path / "data.json").read_text()) == {"identity": "abc"}


@pytest.mark.parametrize("left, kept", [("", []), ('{"started": "20', [{"unreadable": '{"started": "20'}]),
                                        ("[1]", [{"unreadable": "[1]"}]), ("\0\0", [{"unreadable": "\0\0"}]),
                                        ('{"earlier": 3}', [{"unreadable": '{"earlier": 3}'}])])  # fmt: skip
def test_a_log_of_sessions_that_a_crash_left_unreadable_ends_no_run(tmp_path, left, kept):
    run, recipe = RunFolder(tmp_path / "run"), tiny_recipe(tmp_path)
    run.path.mkdir()
    (run.path / "environment.json").write_text(left)
    assert not begun_since_launch(run.path)
    run.write_identity(recipe, {})
    assert json.loads((run.path / "environment.json").read_text())["earlier"] == kept
    run.write_identity(recipe, {})
    assert len(json.loads((run.path / "environment.json").read_text())["earlier"]) == len(kept) + 1


def test_a_replaced_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}")))

    def rename(source, target):
        assert synced == [str(source)]
        replace(source, target)

    monkeypatch.setattr(os, "replace", rename)
    replace_text(tmp_path / "a.json", "{}")
    assert synced == [str(tmp_path / "a.json.tmp"), str(tmp_path)] and (tmp_path / "a.json").read_text() == "{}"


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    with run.lock(), pytest.raises(ConfigError, match="another process is training in"):
        run.lock()
    run.lock().close()


def test_clearing_leaves_what_is_not_the_runs(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.write_identity(tiny_recipe(tmp_path), {})
    (run.checkpoints / "step-000001").mkdir(parents=True)
    (run.path / "notes.txt").write_text("mine")
    run.clear()
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]


def test_clearing_keeps_links_to_other_disks_and_what_else_lies_there(tmp_path):
    run, other = RunFolder(tmp_path / "run"), tmp_path / "large disk"
    (other / "step-000001/sub").mkdir(parents=True)
    (other / "step-000002.old-0123").symlink_to(tmp_path)
    for name in ("thesis.tex", "events.out.tfevents.1", "tokenizer.model"):
        (other / name).write_text("mine")
    run.write_identity(tiny_recipe(tmp_path), {})
    links = (run.checkpoints, run.tensorboard, run.tokenizer)
    for link in links:
        link.symlink_to(other)
    run.clear()
    assert all(link.is_symlink() for link in links)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    assert tmp_path.is_dir()


def test_environment_names_versions_processor_and_command():
    found = environment()
    assert found["packages"]["torch"] and found["python"] and found["command"] and found["cpu"]["model"]

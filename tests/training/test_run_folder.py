"""The run folder: what may change between sessions, who may write where."""

import errno
import json
import os

import pytest
import yaml

from mmcore.errors import CheckpointError, ConfigError, HardwareError
from mmcore.training.run_folder import RunFolder, check_same_recipe, disk_errors, environment, recipe_text
from tests.helpers.tiny_run import tiny_recipe


def compare(before, now):
    """As on resume: the recipe before has been through YAML."""
    return check_same_recipe(yaml.safe_load(recipe_text(before)), now.as_dict(), "run/checkpoints/step-000004")


def test_the_same_recipe_passes_without_notices(tmp_path):
    assert compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path)) == []


def test_every_changed_key_is_named_with_both_values(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        compare(tiny_recipe(tmp_path), tiny_recipe(tmp_path, learning_rate=1e-4, batch_size=6, micro_batch_size=3))
    text = str(caught.value)
    assert "training.learning_rate was 0.003 and is now 0.0001" in text
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


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, HardwareError, "the disk is full at x: free some space and go on with --resume"),
        (errno.EACCES, ConfigError, "no permission to write x"),
        (errno.EROFS, ConfigError, "cannot write x"),
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


def test_environment_names_versions_processor_and_command():
    found = environment()
    assert found["packages"]["torch"] and found["python"] and found["command"] and found["cpu"]["model"]

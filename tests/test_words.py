"""Words that a user gives as paths and numbers: what is none is told in a sentence, wherever it is given."""

import pwd
from pathlib import Path

import pytest

from mmcli import app, chat_input
from mmcore.config import DataConfig, SourceConfig, load_recipe
from mmcore.config.words import expanded, whole_number
from mmcore.data.corpus import cache_folder
from mmcore.data.documents import open_source
from mmcore.data.tokenizer_files import load_tokenizer
from mmcore.errors import ConfigError, DataError
from tests.helpers.tiny_run import write_recipe

NOBODY, LONG = "~nosuchuser/x", "a" * 300


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the system does not know, as in a container."""
    for name in ("HOME", "MM_CACHE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)


def test_a_path_is_what_was_written_but_for_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == "/home/me/x"
    for path in ("./~x", "x/~", "runs/é" + "a" * 253, "/".join(["a" * 255] * 16), ""):
        assert expanded(path) == path


@pytest.mark.parametrize("path, message", [
    (NOBODY, "~nosuchuser/x: there is no home folder ~nosuchuser: write the whole path"),
    (LONG, f"{LONG} is too long for a file's name: give a shorter one"),
    ("é" * 128, "is too long for a file's name"),
    ("/".join(["a" * 255] * 17), "is too long for a file's name"),
    ("a\0b", r"'a\\x00b' holds characters that no file's name can have: give another name"),
    ("a\ud800", r"'a\\ud800' holds characters that no file's name can have"),
])  # fmt: skip
def test_what_no_file_can_be_called(path, message):
    with pytest.raises(DataError, match=message):
        expanded(path, DataError)


@pytest.mark.parametrize("text, number", [
    ("0", 0), ("0128", 128), ("٣", 3), ("²", None), ("", None), ("-1", None), ("1.0", None), ("1_0", None), (" 1", None),
    ("9" * 5000, None),
])  # fmt: skip
def test_whole_numbers(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize("path", [NOBODY, LONG])
def test_every_path_of_a_recipe(path, tmp_path):
    for key in ("checkpoint.folder", "data.cache", "tokenizer.path", "training.init_from"):
        with pytest.raises(ConfigError, match=f"{key} is {path}"):
            load_recipe(write_recipe(tmp_path, {}), [f"{key}={path}"])
    for found, error in ((load_recipe, ConfigError), (load_tokenizer, DataError),
                         (lambda path: open_source(SourceConfig(path)), DataError)):  # fmt: skip
        with pytest.raises(error, match=path):
            found(path)
    with pytest.raises(ConfigError, match=path):
        load_recipe(write_recipe(tmp_path, {"extends": path}))


def test_a_recipes_name_too_long_for_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="runs/a+ is too long"):
        _ = load_recipe(write_recipe(tmp_path, {"name": LONG})).run_folder


@pytest.mark.parametrize("words", [
    ["pretrain", LONG], ["chat", LONG, "--prompt", "x"], ["eval", "nothing", "--data", "x", "--out", LONG],
    ["convert", "nothing", LONG, "--to", "torch"], ["pretrain", "x", "--profile", "²"], ["pretrain", "x", "--gpus", "²"],
    ["eval", "x", "--suite", "all", "--shots", "²"], ["eval", "x", "--suite", "all", "--lengths", "²k"],
])  # fmt: skip
def test_the_commands_say_it_in_a_line(words, capsys):
    assert app.run(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_user_without_a_home(homeless, tmp_path):
    assert chat_input.history_path() is None
    with pytest.raises(DataError, match="~/.cache/mm cannot be the cache folder: set MM_CACHE to one of your own"):
        cache_folder(DataConfig())
    assert cache_folder(DataConfig(cache=str(tmp_path))) == tmp_path
    with pytest.raises(ConfigError, match="there is no home folder ~: write the whole path"):
        DataConfig(cache="~/x")


def test_mm_cache_may_begin_with_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where a folder of this name would be made
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MM_CACHE", "~/cache")
    assert cache_folder(DataConfig()) == tmp_path / "cache" / "data"
    assert chat_input.history_path() == Path(tmp_path / "cache" / "chat_history")

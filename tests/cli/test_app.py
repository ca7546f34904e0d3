"""The `mm` command itself: its table, its exits, its speed."""

import errno
import importlib
import os
import statistics
import subprocess
import sys
import time

import pytest

from mmcli import app, terminal
from mmcore.errors import ConfigError


def mm(*words, **options):
    return subprocess.run([sys.executable, "-m", "mmcli", *words], capture_output=True, text=True, **options)


def test_help_names_every_command():
    result = mm("--help")
    assert result.returncode == 0
    for name, (_, _, line) in app.COMMANDS.items():
        assert name in result.stdout and line in result.stdout


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_every_command_has_help_with_an_example(name):
    result = mm(name, "--help")
    assert result.returncode == 0, result.stderr
    assert "Example" in result.stdout and f"mm {name}" in result.stdout


@pytest.mark.parametrize("name", list(app.COMMANDS))
def test_help_loads_neither_torch_nor_numpy(name):
    module, function, _ = app.COMMANDS[name]
    code = f"import sys, {module} as m; m.{function}; print(sorted({{'torch', 'numpy', 'rich.live'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.slow
def test_help_takes_less_than_twice_the_import_of_typer_and_rich():
    def seconds(*words):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], capture_output=True, check=True)
        return time.perf_counter() - start

    ratios = [seconds("-m", "mmcli", "--help") / seconds("-c", "import typer, rich") for _ in range(7)]
    assert statistics.median(ratios) < 2, ratios


def test_version():
    from mmcore import __version__

    assert mm("--version").stdout == f"mm {__version__}\n"


def test_an_unknown_command_suggests_the_nearest():
    result = mm("pretain")
    assert result.returncode == 2 and "Did you mean 'pretrain'?" in result.stderr


def test_a_missing_recipe_is_one_line_and_exit_2(tmp_path):
    result = mm("pretrain", "nowhere.yaml", cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "mm: there is no recipe nowhere.yaml: check the path\n"


def running(monkeypatch, act):
    """`mm act`, a command that calls `act`."""
    module = importlib.import_module("types").ModuleType("acting")

    def command() -> None:
        act()

    module.act = command
    monkeypatch.setitem(sys.modules, "acting", module)
    monkeypatch.setitem(app.COMMANDS, "act", ("acting", "act", "Act."))
    return app.run(["act"])


def raising(monkeypatch, error):
    """`mm act`, which raises `error`."""

    def act() -> None:
        raise error

    return running(monkeypatch, act)


def test_a_users_mistake_is_one_clean_line(monkeypatch, capsys):
    assert raising(monkeypatch, ConfigError("key\nx\x1b[31m is wrong:\tfix it")) == 2
    assert capsys.readouterr().err == "mm: key x [31m is wrong: fix it\n"


def test_ctrl_c_is_130(monkeypatch):
    assert raising(monkeypatch, KeyboardInterrupt()) == 130


def test_a_full_disk_and_a_missing_permission(monkeypatch, capsys):
    assert raising(monkeypatch, OSError(errno.EFBIG, "File too large", "/x/y")) == 2
    assert "a file may not grow further at /x/y: raise the limit" in capsys.readouterr().err
    assert raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/x/y")) == 2
    assert capsys.readouterr().err == "mm: the disk is full at /x/y: free some space and run the command again\n"
    assert raising(monkeypatch, PermissionError(errno.EACCES, "Permission denied", "/x/y")) == 2
    assert "mm: no permission at /x/y" in capsys.readouterr().err


def test_a_failure_of_ours_is_raised_with_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        raising(monkeypatch, ZeroDivisionError("ours"))
    code = "import sys; from mmcli import app; app.COMMANDS['x'] = ('os', 'abort_', ''); sys.argv = ['mm', 'x']; app.main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen([sys.executable, "-m", "mmcli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def stop_reading(monkeypatch):
    """Standard output becomes a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", open(writer, "w"))


@pytest.mark.parametrize("act", [
    lambda: print("x"), lambda: print("x", flush=True), lambda: terminal.make_console().print("x"),
])  # fmt: skip
def test_a_command_whose_output_nobody_reads_is_done(monkeypatch, act):
    stop_reading(monkeypatch)
    assert running(monkeypatch, act) == 0
    print("more", flush=True)  # as at the interpreter's end


def test_a_rank_of_several_fails_with_its_pipe(monkeypatch):
    stop_reading(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BrokenPipeError):
        running(monkeypatch, lambda: print("x", flush=True))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def test_another_pipe_that_breaks_is_a_failure(monkeypatch):
    with pytest.raises(BrokenPipeError):
        raising(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))


def test_a_mistake_that_nobody_reads_is_one(monkeypatch):
    stop_reading(monkeypatch)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert raising(monkeypatch, ConfigError("wrong")) == 2

"""The `mm` command: the table of commands, and the way out of each.

A command's module is imported when the command runs or shows its help, never for `mm --help`: that costs little
more than importing typer (83 ms against 79 here; with rich's panels it was 165). What a command computes with
(torch, numpy) it imports in its function's body, after the options are read.

Exit status: 0 done, or nobody reads the output any more; 1 a failure of ours (with its traceback), 2 the user's mistake
(one line), 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from mmcore import __version__, processors
from mmcore.errors import MMError

COMMANDS = {
    "pretrain": ("mmcli.pretrain", "pretrain", "Train a model on text, from a recipe."),
    "finetune": ("mmcli.finetune", "finetune", "Go on from a checkpoint: a longer context, or conversations."),
    "eval": ("mmcli.evaluate", "evaluate", "Measure loss on text, or run the suites of knowledge."),
    "chat": ("mmcli.chat", "chat", "Talk to a model, or let it continue a text."),
    "convert": ("mmcli.convert", "convert", "Write a checkpoint in another format."),
}
"""Name -> module, function, line in `mm --help`."""


class _LazyCommands(Mapping):
    """The commands by name; one is built, and its module imported, when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        module, function, _ = COMMANDS[name]
        one = typer.Typer(rich_markup_mode=None, add_completion=False)
        one.command(name)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(one)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Commands(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _LazyCommands()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


app = typer.Typer(cls=_Commands, rich_markup_mode=None, no_args_is_help=True, add_completion=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mm {__version__}")
        raise typer.Exit()


@app.callback()
def _mm(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Memory Mosaics v2: pretrain, fine-tune, evaluate, convert and talk to them.

    \b
    Example:
      mm pretrain recipes/quickstart.yaml
      mm chat runs/quickstart
    """


def main() -> None:
    """The entry point of `mm`."""
    processors.keep_to_quota()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; its exit status. Anything but a user's mistake, Ctrl-C or a closed pipe is raised."""
    try:
        typer.main.get_command(app).main(arguments, prog_name="mm")
        return 0
    except SystemExit as leaving:
        broken = leaving.__context__  # of a closed pipe typer makes a failure without a word, before we hear of it
        return _leave_quietly(broken) if isinstance(broken, BrokenPipeError) else _status(leaving.code)
    except MMError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError as error:
        return _leave_quietly(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _complain(f"the disk is full{_at(error)}: free some space and run the command again")
        if error.errno == errno.EFBIG:
            return _complain(f"a file may not grow further{_at(error)}: raise the limit on the size of files (ulimit -f)")
        if error.errno == errno.ENAMETOOLONG:
            return _complain(f"a name is too long{_at(error)}: give a shorter one")
        if isinstance(error, PermissionError):
            return _complain(f"no permission{_at(error)}: change the permissions, or choose another place")
        raise
    finally:
        _flush()


def _status(code: Any) -> int:
    return code if isinstance(code, int) else int(code is not None)


def _complain(message: str) -> int:
    """One line, whatever the message holds: control characters from a file's text must not reach the terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    with contextlib.suppress(BrokenPipeError):
        print(f"mm: {line}", file=sys.stderr)
    return 2


def _at(error: OSError) -> str:
    return f" at {error.filename}" if error.filename else ""


def _leave_quietly(error: BrokenPipeError) -> int:
    """Whoever read our output has gone (`mm ... | head`): drop the rest, and the complaint at the interpreter's end.

    Raises `error` where it was another pipe that broke, and in a rank of several, for which the others would wait.
    """
    if not _is_unread(sys.stdout) or os.environ.get("WORLD_SIZE", "1") != "1":
        raise error
    from mmcli.terminal import drop_output

    drop_output()
    return 0


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream goes into a pipe that nobody reads any more."""
    import select

    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):  # it is none of the system's, closed, or none at all
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _flush() -> None:
    try:
        if sys.stdout is not None:  # as after `>&-`
            sys.stdout.flush()
    except BrokenPipeError as error:
        _leave_quietly(error)

"""The line editor of `mm chat`: history, several lines, completion of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from mmcli.chat_commands import COMMANDS, Settings
from mmcli.terminal import dim
from mmcore.config.words import expanded
from mmcore.errors import ConfigError


class LineEditor:
    """Reads what the user says.

    Enter sends; Alt-Enter, or Enter after a backslash, begins a new line; pasted text keeps its lines.
    """

    def __init__(self, history_file: Path | None, input: Input | None = None, output: Output | None = None) -> None:
        """`history_file`: where lines are kept from one conversation to the next; None: nowhere."""
        self.history = InMemoryHistory() if history_file is None else _KeptHistory(str(history_file))
        self._told = False
        self._session: PromptSession[str] = PromptSession(
            message="> ",
            prompt_continuation="  ",
            multiline=True,
            history=self.history,
            key_bindings=_bindings(),
            completer=CommandCompleter(),
            complete_while_typing=Condition(self._on_command),
            input=input,
            output=output,
        )

    def read(self) -> str:
        """The next text. Raises EOFError on Ctrl-D and KeyboardInterrupt on Ctrl-C."""
        text = self._session.prompt()
        if not self._told and (fault := getattr(self.history, "fault", None)):
            self._told = True
            print(dim(f"[what you type is no longer kept, for its file {fault}]", sys.stdout))
        return text

    def _on_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")


class _KeptHistory(FileHistory):
    """Lines in a file. One that cannot be read or written, on a disk that is full meanwhile, costs only what would have
    been kept: the editor has the lines of this conversation in memory, and must not stop for an error of ours."""

    fault: str | None = None
    """What is wrong with the file, once something is."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return super().load_history_strings()
        except OSError as error:
            self.fault = f"cannot be read ({error.strerror})"
            return ()

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as error:
            self.fault = f"cannot be written ({error.strerror})"


class CommandCompleter(Completer):
    """Names of commands, of settings after /set, and of files after /save and /load."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event) -> Iterator[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        command, space, rest = text.partition(" ")
        if not space:
            for name, meaning in COMMANDS.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display_meta=meaning)
        elif command in ("/save", "/load"):
            yield from self._paths.get_completions(Document(rest), complete_event)
        elif command == "/set":
            word = rest.split(" ")[-1]
            for name, value in vars(Settings()).items():
                if name.startswith(word):
                    yield Completion(f"{name}=", -len(word), display_meta=f"at first {value}")


def history_path() -> Path | None:
    """The file for what was typed, made readable by its owner only: $MM_CACHE/chat_history, or in
    $XDG_STATE_HOME/mm or ~/.local/state/mm. None where it cannot be written."""
    cache, state = os.environ.get("MM_CACHE"), os.environ.get("XDG_STATE_HOME")
    try:
        folder = Path(expanded(cache)) if cache else Path(expanded(state or "~/.local/state")) / "mm"
        path = folder / "chat_history"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except (OSError, ConfigError):
        return None
    return path


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor(1)
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings

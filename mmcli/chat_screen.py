"""The conversation on a terminal: a loop of reading, answering and commands."""

from __future__ import annotations

import secrets
import signal
import sys
from dataclasses import asdict, replace
from types import FrameType

from mmcli.chat_commands import COMMANDS, Settings, parse_command, text_of
from mmcli.chat_input import LineEditor
from mmcli.terminal import clean, dim
from mmcore.errors import ConfigError, MMError
from mmcore.generation.conversation import Conversation

_PROGRESS_FROM = 2048
"""Prompts of fewer tokens are read without a word."""


class Interrupts:
    """Within it Ctrl-C only raises a flag, for the model must not stop within a token; a second one leaves."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class _Stopped(Exception):
    """Ctrl-C while a prompt is read."""


class Screen:
    """Holds the conversation, its settings, and what has been said about them already."""

    def __init__(self, conversation: Conversation, settings: Settings, editor: LineEditor, fixed_seed: bool) -> None:
        """`fixed_seed`: the user chose the seed; otherwise each fresh conversation draws another."""
        self.conversation = conversation
        self.settings = settings
        self.editor = editor
        self._fixed_seed = fixed_seed
        self._said_long = False
        self._said_cut = False
        self._draw_seed()

    def run(self) -> None:
        """Talk until /exit or Ctrl-D."""
        while True:
            try:
                line = self.editor.read()
                command = parse_command(line)
                if command is None:
                    self._answer(text_of(line))
                elif command[0] == "/exit":
                    return
                else:
                    self._obey(*command)
            except EOFError:
                return
            except KeyboardInterrupt:
                self._note("Ctrl-D or /exit leaves")
            except MMError as error:
                self._note(str(error))

    def _answer(self, text: str) -> None:
        conversation = self.conversation
        if conversation.template is not None and not text.strip():
            return
        with Interrupts() as interrupts:

            def progress(done: int, total: int) -> None:
                if total >= _PROGRESS_FROM and sys.stdout.isatty():
                    line = "" if done == total else f"reading {done:,} of {total:,} tokens"
                    print(f"\r\x1b[K{line}", end="", flush=True)
                if interrupts.asked and done < total:
                    raise _Stopped

            pieces = conversation.say(text, self.settings.max_new_tokens, self.settings.sampling, progress)
            try:
                for piece in pieces:
                    print(clean(piece), end="", flush=True)
                    if interrupts.asked:
                        break
            except _Stopped:
                conversation.take_back()
                print(end="\r\x1b[K")
                self._note("stopped; the model has not read all of it, so it counts as not said")
                return
        print()
        self._comment(interrupts.asked)

    def _comment(self, stopped: bool) -> None:
        """What there is to say about the answer just given."""
        conversation = self.conversation
        base = conversation.template is None
        if stopped:
            self._note("stopped; what was said so far is remembered")
        elif conversation.ended == "length" and not self._said_cut:
            self._said_cut = True
            more = "Enter alone goes on, " if base else ""
            self._note(f"cut at {self.settings.max_new_tokens} tokens: {more}/set max_new_tokens=N allows more")
        elif conversation.ended == "stop" and base:
            self._note("the text ended here; what you write is put behind it, /reset begins another")
        if not self._said_long and (notice := long_context(conversation)):
            self._said_long = True
            self._note(notice)

    def _obey(self, command: str, rest: str) -> None:
        if command in ("/save", "/load") and not rest:
            raise ConfigError(f"{command} needs a file: write {command} talk.mm")
        if command == "/help":
            print("\n".join(f"  {name:8}{meaning}" for name, meaning in COMMANDS.items()))
            print("  Alt-Enter, or a backslash before Enter, begins a new line; // begins a text with a slash.")
        elif command == "/set":
            if rest:
                self.settings = self.settings.changed(rest)
                self._fixed_seed |= "seed" in rest
            self._note(str(self.settings))
        elif command == "/why":
            from mmcli.inspect_text import why  # torch's and matplotlib's, and rarely asked

            print("\n".join(why(self.conversation, rest)))
        elif command == "/stats":
            print(statistics(self.conversation))
            print(f"settings   {self.settings}")
        elif command == "/reset":
            self.conversation.reset()
            self._draw_seed()
            self._note("everything said is forgotten")
        elif command == "/save":
            self.conversation.save(rest, asdict(self.settings))
            self._note(f"saved; `/load {rest}` goes on from here with the same checkpoint")
        elif command == "/load":
            self._load(rest)

    def _load(self, file: str) -> None:
        """Go on with a saved conversation and its settings, which earlier files do not hold, and show what was said."""
        saved = self.conversation.load(file, Settings.saved)
        whose = "settings as before, for none were saved"
        if saved is not None:
            self.settings, whose = Settings.saved(saved), "settings as saved"
        for message in self.conversation.messages:
            print(("> " if message["role"] == "user" else "") + clean(message["content"]))
        length = self.conversation.session.length
        self._note(f"{length:,} tokens remembered; nothing was read again; {whose}: {self.settings}")

    def _draw_seed(self) -> None:
        if not self._fixed_seed:
            self.settings = replace(self.settings, seed=secrets.randbelow(1_000_000))

    def _note(self, text: str) -> None:
        print(dim(f"[{clean(text)}]", sys.stdout), flush=True)


def statistics(conversation: Conversation) -> str:
    """Speed and memory as lines for people."""
    session, stats = conversation.session, conversation.session.stats
    trained = session.model.config.max_position_embeddings
    rows = {
        "reading": f"{stats.prefill_rate:,.1f} tokens/s ({stats.prefill_tokens:,} tokens)",
        "answering": f"{stats.decode_rate:,.1f} tokens/s ({stats.decode_tokens:,} tokens)",
        "memory": f"{session.length:,} tokens remembered in {session.state_bytes / 2**20:,.1f} MiB "
                  f"(trained with {trained:,} tokens of context)",
    }
    return "\n".join(f"{name:11}{text}" for name, text in rows.items())


def long_context(conversation: Conversation) -> str | None:
    """A sentence where the text has outgrown the context that the model was trained with."""
    length, trained = conversation.session.length, conversation.session.model.config.max_position_embeddings
    if length <= trained:
        return None
    return f"the text has {length:,} tokens and the model was trained with {trained:,}: what follows may be worse"

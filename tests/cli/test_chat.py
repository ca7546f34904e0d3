"""`mm chat`: one shot, commands, the line editor, hygiene; and the real program in a terminal."""

import errno
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import mmcore
from mmcli import chat_input, chat_screen, terminal
from mmcli.app import run
from mmcli.chat_commands import COMMANDS, Settings, parse_command, text_of
from mmcore.checkpoint.formats import write_exported
from mmcore.config import ModelConfig
from mmcore.data.conversations import CHAT_TEMPLATE
from mmcore.data.sentencepiece_model import train_sentencepiece
from mmcore.data.tokenizer import Tokenizer
from mmcore.errors import ConfigError
from mmcore.evaluation.inspection import inspect
from mmcore.generation.conversation import Conversation
from mmcore.model import build_model
from tests.generation.fakes import FakeModel
from tests.helpers.models import tiny

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Once upon a time there was a cat. She said: hello world!\n\n"] * 40
HOSTILE = "a\x1b[31mred\x1b]0;title\x07b\x9b2Jc\x7f\x08d\re\u202eevil\u2066f\U000e0041g\tt\nn"


@pytest.fixture(scope="module")
def base_tokenizer():
    return train_sentencepiece(TEXTS, 300)


@pytest.fixture(scope="module")
def chat_tokenizer(base_tokenizer):
    return Tokenizer(base_tokenizer.model, chat_template=CHAT_TEMPLATE)


@pytest.fixture(params=["base", "chat"])
def tokenizer(request, base_tokenizer, chat_tokenizer):
    return chat_tokenizer if request.param == "chat" else base_tokenizer


@pytest.fixture
def loaded(monkeypatch, tokenizer):
    """`mm chat` opens a small stand-in model."""
    monkeypatch.setattr("mmcore.checkpoint.resolve.resolve_checkpoint", lambda path, **_: path)
    monkeypatch.setattr(mmcore, "load_model", lambda path, **_: FakeModel(300), raising=False)
    monkeypatch.setattr(mmcore, "load_tokenizer", lambda path, other=None: tokenizer, raising=False)


def give_stdin(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


class TestHygiene:
    def test_only_what_can_be_shown_is_left(self):
        assert terminal.clean(HOSTILE) == "a[31mred]0;titleb2Jcdeevilfg\tt\nn"

    def test_text_of_all_scripts_stays(self):
        text = "naïve Ω 日本 🐈‍⬛ עברית العربية e\u0301 \ufffd"
        assert terminal.clean(text) == text

    def test_surrogates_can_be_printed(self):
        terminal.clean("a\udc80b").encode()

    @settings(max_examples=40, deadline=None)
    @given(st.text(HOSTILE + "é日🐈\u200d\udc80"), st.integers(0, 20))
    def test_pieces_are_as_clean_as_the_whole(self, text, cut):
        assert terminal.clean(text[:cut]) + terminal.clean(text[cut:]) == terminal.clean(text)
        left = terminal.clean(text)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c]", left)

    def test_names_take_one_short_line(self):
        assert terminal.clean_line("a\nb\x1b[2J" + "c" * 300, 20) == "a b[2J" + "c" * 11 + "..."


class TestCommands:
    def test_lines_that_are_text(self):
        for line in ("hello", "", " /help", "//etc/passwd is a file", "/usr\nis a folder"):
            assert parse_command(line) is None
        assert text_of("//etc/passwd") == "/etc/passwd"
        assert text_of(" /help") == " /help"

    def test_lines_that_are_commands(self):
        assert parse_command("/save  a file.mm ") == ("/save", "a file.mm")
        assert parse_command("/quit") == ("/exit", "")
        assert {parse_command(name)[0] for name in COMMANDS} == set(COMMANDS)

    @pytest.mark.parametrize("line, message", [
        ("/sav x", "no command /sav: did you mean /save?"),
        ("/xyzzy", "no command /xyzzy: choose from /help, /set"),
    ])
    def test_commands_that_do_not_exist(self, line, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            parse_command(line)

    def test_settings_change(self):
        changed = Settings().changed("temperature=0.3 top_k=7 top-p=none max_new_tokens=9 seed=5")
        assert changed == Settings(0.3, 7, None, 9, 5)
        assert str(changed) == "temperature=0.3 top_k=7 top_p=none max_new_tokens=9 seed=5"

    @pytest.mark.parametrize("words, message", [
        ("temprature=1", "no setting temprature: did you mean temperature?"),
        ("temperature=warm", "temperature is 'warm': it must be a number"),
        ("temperature", "temperature sets nothing: write temperature=0.8"),
        ("temperature=-1", "temperature is -1.0: it must be a number, 0"),
        ("temperature=none", "temperature is 'none': it must be a number"),
        ("top_k=2.5", "top_k is '2.5': it must be a whole number, or none"),
        ("max_new_tokens=0", "max_new_tokens is 0: it must be a whole number of at least 1"),
        ("top_p=0.5 seed=-3", "seed is -3"),
    ])
    def test_settings_that_are_wrong(self, words, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            Settings().changed(words)


class TestOneShot:
    def test_a_prompt(self, loaded, capsys):
        assert run(["chat", "x", "--prompt", "Once upon", "--max-new-tokens", "20"]) == 0
        first = capsys.readouterr()
        assert first.out.endswith("\n") and len(first.out) > 5 and first.err == ""
        run(["chat", "x", "--prompt", "Once upon", "--max-new-tokens", "20"])
        assert capsys.readouterr().out == first.out  # the seed is 0 unless another is given
        run(["chat", "x", "--prompt", "Once upon", "--max-new-tokens", "20", "--seed", "3"])
        assert capsys.readouterr().out != first.out

    def test_standard_input_is_the_same(self, loaded, monkeypatch, capsys):
        run(["chat", "x", "--prompt", "Once üpon"])
        expected = capsys.readouterr().out
        for data in ("Once üpon", "Once üpon\n", "Once üpon\r\n"):
            give_stdin(monkeypatch, data.encode())
            assert run(["chat", "x"]) == 0
            assert capsys.readouterr().out == expected

    def test_json(self, loaded, tokenizer, capsys):
        arguments = ["chat", "x", "--prompt", "Once upon", "--json", "--max-new-tokens", "20", "--temperature", "0"]
        assert run(arguments) == 0
        out, err = capsys.readouterr()
        values = json.loads(out)
        assert err == "" and out.count("\n") == 1
        assert tokenizer.decode(values["ids"]).startswith(values["text"])
        assert values["mode"] == ("base" if tokenizer.chat_template is None else "chat")
        assert values["ended"] in ("stop", "length")
        assert values["settings"] == {"temperature": 0, "top_k": None, "top_p": 0.95, "max_new_tokens": 20, "seed": 0}
        stats = values["stats"]
        assert stats["tokens_remembered"] == stats["prefill_tokens"] + len(values["ids"])
        assert stats["decode_tokens_per_second"] > 0

    def test_hostile_output(self, loaded, tokenizer, monkeypatch, capsys):
        """The model says escape sequences: bytes that the tokenizer has one by one."""
        monkeypatch.setattr(mmcore, "load_model", lambda path, **_: Parrot(300, tokenizer.encode(HOSTILE)))
        run(["chat", "x", "--prompt", "go", "--temperature", "0", "--max-new-tokens", "300"])
        assert capsys.readouterr().out.startswith(terminal.clean(HOSTILE))
        run(["chat", "x", "--prompt", "go", "--temperature", "0", "--max-new-tokens", "300", "--json"])
        out = capsys.readouterr().out
        assert out.isascii() and out.strip().isprintable()
        assert json.loads(out)["text"].startswith(HOSTILE)

    def test_longer_than_trained_is_said_once(self, loaded, capsys):
        run(["chat", "x", "--prompt", "Once upon a time " * 30, "--max-new-tokens", "9"])
        err = capsys.readouterr().err
        assert err.count("the model was trained with 64") == 1

    @pytest.mark.parametrize("arguments, message", [
        (["--prompt", ""], "the prompt is empty: give text with --prompt, or on standard input"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0: it must be a number, 0"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0: it must lie above 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--prompt", "x", "--dtype", "int3"], "--dtype is 'int3': choose float32, bfloat16, float16 or int8"),
        (["--prompt", "a\udc80"], "half of a surrogate pair"),
    ])
    def test_bad_input_is_one_line(self, loaded, capsys, arguments, message):
        assert run(["chat", "x", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err

    @pytest.mark.parametrize("data, message", [
        (b"", "the prompt is empty"),
        (b"\n", "the prompt is empty"),
        (b"caf\xe9", "standard input is not UTF-8 (byte 3): convert it first"),
    ])
    def test_bad_standard_input(self, loaded, monkeypatch, capsys, data, message):
        give_stdin(monkeypatch, data)
        assert run(["chat", "x"]) == 2
        assert message in capsys.readouterr().err

    def test_a_system_message_needs_a_chat_model(self, loaded, tokenizer, capsys):
        status = run(["chat", "x", "--prompt", "hi", "--system", "Be brief."])
        err = capsys.readouterr().err
        if tokenizer.chat_template is None:
            assert status == 2 and "this is a base model" in err
        else:
            assert status == 0

    def test_options_reach_the_loader(self, loaded, monkeypatch):
        seen = {}
        load = lambda path, **values: seen.update(values, path=path) or FakeModel(300)  # noqa: E731
        monkeypatch.setattr(mmcore, "load_model", load)
        options = ["--dtype", "bf16", "--device", "cpu", "--without", "long_term, short_term"]
        run(["chat", "runs/x", "--prompt", "hi", *options])
        without = ("long_term", "short_term")
        assert seen == {"path": "runs/x", "dtype": torch.bfloat16, "device": "cpu", "without": without}


class Parrot(FakeModel):
    """Says the given ids after whatever it was asked, again and again."""

    def __init__(self, vocab_size, ids):
        super().__init__(vocab_size)
        self.ids = ids

    def advance(self, tokens, state, last_only=True):
        super().advance(tokens, state)
        state.said = getattr(state, "said", -1) + 1
        logits = torch.zeros(1, self.config.vocab_size)
        logits[0, self.ids[state.said % len(self.ids)]] = 1.0
        return logits


class Typist:
    """Stands for the line editor; an exception in the list is raised."""

    def __init__(self, *lines):
        self.lines = [*lines, EOFError()]

    def read(self):
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line


def talk(tokenizer, *lines, model=None, chosen=None, fixed_seed=True):
    chosen = chosen or Settings(max_new_tokens=8)
    screen = chat_screen.Screen(Conversation(model or FakeModel(300), tokenizer), chosen, Typist(*lines), fixed_seed)
    screen.run()
    return screen


class TestScreen:
    def test_turns_and_leaving(self, tokenizer, capsys):
        screen = talk(tokenizer, "hello", "again", "/exit", "never read")
        assert len(screen.conversation.messages) == 4
        answers = [message["content"] for message in screen.conversation.messages if message["role"] == "assistant"]
        out = capsys.readouterr().out
        assert all(terminal.clean(answer) in out for answer in answers)
        assert out.count("cut at 8 tokens") <= 1  # said once

    def test_empty_lines(self, tokenizer):
        screen = talk(tokenizer, "hello", "", "   ")
        said = [message["content"] for message in screen.conversation.messages if message["role"] == "user"]
        assert said == (["hello"] if tokenizer.chat_template else ["hello", "", "   "])

    def test_ctrl_c_at_the_prompt_keeps_the_session(self, tokenizer, capsys):
        screen = talk(tokenizer, "hello", KeyboardInterrupt(), "again")
        assert len(screen.conversation.messages) == 4
        assert "Ctrl-D or /exit leaves" in capsys.readouterr().out

    def test_ctrl_c_stops_an_answer_and_keeps_the_session(self, tokenizer, capsys):
        model = FakeModel(300)
        plain = model.advance

        def advance(tokens, state):
            if len(model.passes) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return plain(tokens, state)

        model.advance = advance
        before = signal.getsignal(signal.SIGINT)
        screen = talk(tokenizer, "hello", "again", model=model, chosen=Settings(max_new_tokens=1000, top_k=5))
        assert "stopped; what was said so far is remembered" in capsys.readouterr().out
        assert len(screen.conversation.messages) == 4
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_second_ctrl_c_leaves(self, tokenizer):
        model = FakeModel(300)
        plain = model.advance

        def advance(tokens, state):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            return plain(tokens, state)

        model.advance = advance
        conversation = Conversation(model, tokenizer)
        screen = chat_screen.Screen(conversation, Settings(), Typist("hello"), True)
        with pytest.raises(KeyboardInterrupt):
            screen._answer("hello")

    def test_ctrl_c_while_a_long_prompt_is_read(self, tokenizer, capsys):
        model = FakeModel(300)
        plain = model.advance

        def advance(tokens, state):
            if len(model.passes) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return plain(tokens, state)

        model.advance = advance
        screen = talk(tokenizer, "hello " * 1600, "again", model=model)
        out = capsys.readouterr().out
        assert "stopped; the model has not read all of it, so it counts as not said" in out
        assert "what was said so far is remembered" not in out
        assert [message["content"] for message in screen.conversation.messages[::2]] == ["again"]
        alone = talk(tokenizer, "again")
        assert screen.conversation.messages == alone.conversation.messages
        assert screen.conversation.session.history == alone.conversation.session.history
        assert sum(model.passes) >= len(screen.conversation.session.history) - 1  # all of it was read in the end

    def test_commands(self, tokenizer, capsys, tmp_path):
        path = tmp_path / "talk.mm"
        screen = talk(
            tokenizer, "/help", "/set", "/set temperature=0 max_new_tokens=5", "hello", "/stats", f"/save {path}",
            "/reset", "/stats", f"/load {path}", "/sav", "/save", "/load nothing.mm", "/set seed",
        )
        out = capsys.readouterr().out
        for text in (*COMMANDS, "[temperature=0.0 top_k=none", "answering", "\nmemory     0 tokens remembered in",
                     "everything said", "saved; `/load", "nothing was read again", "did you mean /save?",
                     "/save needs a file: write /save talk.mm", "there is no saved session nothing.mm",
                     "seed sets nothing: write seed=0"):
            assert text in out, text
        assert len(screen.conversation.messages) == 2

    def test_a_loaded_conversation_goes_on_with_its_settings(self, tokenizer, capsys, tmp_path):
        path, chosen = tmp_path / "talk.mm", Settings(temperature=1.5, top_k=200, top_p=None, max_new_tokens=20, seed=7)
        said = talk(tokenizer, "hello", f"/save {path}", "more", chosen=chosen)
        other = talk(tokenizer, f"/load {path}", "more", chosen=Settings(0.1, max_new_tokens=3, seed=1), fixed_seed=False)
        assert other.settings == chosen
        assert other.conversation.session.history == said.conversation.session.history
        assert f"nothing was read again; settings as saved: {chosen}]" in capsys.readouterr().out

    def test_a_conversation_saved_without_settings_or_with_others(self, tokenizer, capsys, tmp_path):
        old, chosen = Conversation(FakeModel(300), tokenizer), Settings(seed=3)
        list(old.say("hello", 3))
        old.save(tmp_path / "old")
        screen = talk(tokenizer, f"/load {tmp_path / 'old'}", chosen=chosen)
        assert screen.settings == chosen and screen.conversation.messages == old.messages
        assert f"settings as before, for none were saved: {chosen}]" in capsys.readouterr().out
        for values in (3, {"min_p": 0.1}, {"seed": -1}, {"temperature": "hot"}, {"max_new_tokens": None}):
            old.save(tmp_path / "bad", values)
            screen = talk(tokenizer, f"/load {tmp_path / 'bad'}", chosen=chosen)
            assert screen.settings == chosen and screen.conversation.session.length == 0
            assert "bad holds settings that cannot be used: " in capsys.readouterr().out

    @pytest.mark.parametrize("line, message", [
        ("/save ~nosuchuser/x.mm", "[~nosuchuser/x.mm: there is no home folder ~nosuchuser: write the whole path]"),
        ("/load ~nosuchuser/x.mm", "[~nosuchuser/x.mm: there is no home folder ~nosuchuser: write the whole path]"),
        ("/save " + "a" * 300, "aaa is too long for a file's name: give a shorter one]"),
        ("/load " + "a" * 300, "aaa is too long for a file's name: give a shorter one]"),
        ("/save " + "a" * 250, "aaa: File name too long: check the disk and the path; the conversation goes on unsaved]"),
        ("/save file/x", "[cannot write file/x: Not a directory: check the disk and the path; the conversation goes on unsaved]"),
        ("/load file/x", "[there is no saved session file/x: check the name]"),
        ("/save /", "[/ is a folder: name a file to save the session in]"),
        ("/save .", "[. is a folder: name a file to save the session in]"),
        ("/why ²", "[/why ²: there is no such token; /why takes how many tokens from the end, 1 to"),
        ("/why " + "9" * 5000, "there is no such token"),
    ])
    def test_a_mistyped_name_or_number_is_a_line(self, base_tokenizer, capsys, tmp_path, monkeypatch, line, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("")
        screen = talk(base_tokenizer, "hello", line, "again")
        out = capsys.readouterr().out
        assert message in out and len(screen.conversation.messages) == 4
        assert os.listdir() == ["file"]

    def test_a_file_that_may_not_be_seen(self, base_tokenizer, capsys, monkeypatch):
        """As another user's folder; the superuser of these tests may see all."""

        def refuse(self, **_):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))

        monkeypatch.setattr(Path, "stat", refuse)
        talk(base_tokenizer, "/save talk.mm", "/load talk.mm")
        out = capsys.readouterr().out
        assert "[cannot write talk.mm: no permission to write there" in out and "[talk.mm cannot be read (" in out

    def test_why(self, tokenizer, capsys):
        """What the heads read before a token, as mm eval --inspect has it for the text up to there."""
        model = tiny(vocab_size=300)
        screen = talk(tokenizer, "/why", "the quick brown fox", "/why", "/why 3", "/why -3", "/why x", "/why 99",
                      model=model, chosen=Settings(temperature=0, max_new_tokens=4))
        out = capsys.readouterr().out
        assert out.count("nothing has been said yet") == 1 and out.count("there is no such token") == 2
        history = screen.conversation.session.history
        pieces = [tokenizer.decode([token], special=True, continues=True) for token in history]
        for back in (1, 3, 3):
            place = len(history) - back
            begun = f"Before {pieces[place]!r} (token {place}), at {pieces[place - 1]!r}, the heads read:\n"
            assert begun in out
            part = out[out.index(begun):]
            for read in inspect(model, history[:place]):
                if read.memory == "short_term" and read.size:
                    ((at, weight),) = read.strongest(1)
                    line = next(line for line in part.splitlines() if f"layer {read.layer} head {read.head} " in line)
                    assert f"{read.size:>6}{read.bandwidth:>8.2f} " in line and f" {weight:.2f} {pieces[at]!r} {at - place + 1}" in line

    def test_a_loaded_conversation_is_shown_clean(self, tokenizer, capsys, tmp_path):
        conversation = Conversation(FakeModel(300), tokenizer)
        conversation.messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
        conversation.save(tmp_path / "talk")
        capsys.readouterr()
        talk(tokenizer, f"/load {tmp_path / 'talk'}")
        out = capsys.readouterr().out
        assert out.count(terminal.clean(HOSTILE)) == 2
        assert "\x1b" not in out and "\x9b" not in out and "\u202e" not in out

    def test_a_longer_text_than_trained_is_said_once(self, tokenizer, capsys):
        talk(tokenizer, *["hello"] * 12, chosen=Settings(max_new_tokens=30, top_k=3))
        assert capsys.readouterr().out.count("the model was trained with 64") == 1

    def test_seeds_are_drawn_unless_one_was_given(self, tokenizer, capsys):
        talk(tokenizer, "/set", "/reset", "/set", "/set seed=7", "/reset", "/set", fixed_seed=False)
        seeds = re.findall(r"seed=(\d+)", capsys.readouterr().out)
        assert len(set(seeds[:2])) == 2 and seeds[2:] == ["7", "7"]

    def test_errors_do_not_end_the_conversation(self, tokenizer, capsys):
        screen = talk(tokenizer, "bad \udc80", "good")
        assert "half of a surrogate pair" in capsys.readouterr().out
        assert len(screen.conversation.messages) == 2


class TestLineEditor:
    @pytest.fixture
    def typed(self, tmp_path):
        def read(keys, lines=1, history=None):
            with create_pipe_input() as pipe:
                editor = chat_input.LineEditor(history, pipe, DummyOutput())
                pipe.send_text(keys)
                return [editor.read() for _ in range(lines)]

        return read

    @pytest.mark.parametrize("keys, text", [
        ("hello\r", "hello"),
        ("one\\\rtwo\r", "one\ntwo"),
        ("one\x1b\rtwo\r", "one\ntwo"),
        ("\x1b[200~pasted\r\nlines\nhere\x1b[201~\r", "pasted\nlines\nhere"),
        ("a\x1b[200~\x1b[31m\x1b[201~b\r", "a\x1b[31mb"),
        ("\r", ""),
    ])
    def test_keys(self, typed, keys, text):
        assert typed(keys) == [text]

    def test_ctrl_c_and_ctrl_d(self, typed):
        with pytest.raises(KeyboardInterrupt):
            typed("half\x03")
        with pytest.raises(EOFError):
            typed("\x04")

    def test_lines_are_kept_for_the_next_conversation(self, typed, tmp_path):
        path = tmp_path / "history"
        typed("first\rone\\\rtwo\r", 2, path)
        assert typed("\x1b[A\x1b[A\x1b[A\r", 1, path) == ["first"]  # up: two lines of the last, then the first

    def test_a_file_that_can_no_longer_be_written_is_told_once(self, capsys, tmp_path):
        path = tmp_path / "cache" / "history"
        path.parent.mkdir()
        with create_pipe_input() as pipe:
            editor = chat_input.LineEditor(path, pipe, DummyOutput())
            shutil.rmtree(path.parent)
            pipe.send_text("first\rsecond\r")
            pipe.close()
            assert [editor.read(), editor.read()] == ["first", "second"]
        assert editor.history.get_strings() == ["first", "second"]  # what the arrow keys go through
        message = "[what you type is no longer kept, for its file cannot be written (No such file or directory)]\n"
        assert capsys.readouterr().out == message

    def test_a_file_that_cannot_be_read(self, typed, capsys, tmp_path):
        assert typed("first\r", 1, tmp_path) == ["first"]  # a folder
        assert capsys.readouterr().out.count("no longer kept") == 1

    def test_the_history_file_is_private(self, monkeypatch, tmp_path):
        monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
        path = chat_input.history_path()
        assert path == tmp_path / "cache" / "chat_history"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        chat_input.history_path()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_a_place_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MM_CACHE", str(tmp_path / "file" / "below"))
        assert chat_input.history_path() is None
        (tmp_path / "chat_history").symlink_to(tmp_path / "file")
        monkeypatch.setenv("MM_CACHE", str(tmp_path))
        assert chat_input.history_path() is None

    @pytest.mark.parametrize("text, expected", [
        ("/s", ["/set", "/stats", "/save"]),
        ("/set t", ["temperature=", "top_k=", "top_p="]),
        ("hello /s", []),
        ("/help\n/s", []),
    ])
    def test_completion(self, text, expected):
        from prompt_toolkit.document import Document

        completions = chat_input.CommandCompleter().get_completions(Document(text), None)
        assert [completion.text for completion in completions] == expected


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base_tokenizer):
    """A real, untrained mosaic on disk."""
    config = ModelConfig(vocab_size=304, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, short_term_window=16, long_term_delay=4, long_term_delay_range=(4, 16),
                         max_position_embeddings=128)
    model = build_model(config)
    model.init_weights(0)
    with torch.no_grad():  # a logit of 0 is never the largest of 304: read greedily, its text has no end
        model.lm_head.weight[base_tokenizer.eos_id] = 0
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return write_exported(folder, config, model.state_dict(), tokenizer_files=base_tokenizer.files())


def mm(*arguments, data=b"", **environment):
    command = [sys.executable, "-m", "mmcli", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(command, input=data, capture_output=True, cwd=ROOT, env=env, timeout=120, check=False)


READY = "\x1b[?2004h"
"""The line editor asks the terminal to mark pasted text: it waits for keys."""


@pytest.mark.slow
class TestTheProgram:
    def test_one_shot(self, checkpoint):
        result = mm("chat", checkpoint, "--max-new-tokens", "12", "--json", data=b"Once upon a time")
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["mode"] == "base"
        plain = mm("chat", checkpoint, "--max-new-tokens", "12", data=b"Once upon a time", PYTHONIOENCODING="latin-1")
        assert plain.returncode == 0 and b"\x1b" not in plain.stdout

    def test_bad_input(self, checkpoint, tmp_path):
        for arguments, data, message in (
            ((tmp_path / "nowhere",), b"hi", b"nowhere"),
            ((tmp_path / "nowhere",), b"", b"there is no checkpoint at"),
            ((checkpoint,), b"\xff\xfe", b"standard input is not UTF-8"),
            ((checkpoint,), b"", b"the prompt is empty"),
            ((checkpoint, "--without", "medium_term"), b"hi", b"medium_term"),
        ):
            result = mm("chat", *arguments, data=data)
            assert (result.returncode, result.stdout) == (2, b""), result.stderr
            assert message in result.stderr and result.stderr.count(b"\n") == 1

    def test_a_conversation_in_a_terminal(self, checkpoint, tmp_path):
        saved = tmp_path / "talk.mm"
        with Terminal(["chat", str(checkpoint), "--seed", "1", "--max-new-tokens", "20"], tmp_path) as screen:
            screen.wait("base model")
            screen.wait(READY)
            screen.type("Once upon\\\ra time\r")
            screen.wait(READY)
            screen.type("/set temperature=0 max_new_tokens=100000\r")  # greedy: never the end by chance
            screen.wait("[temperature")
            screen.type("\r")
            time.sleep(1.0)
            screen.type("\x03")
            screen.wait("stopped; what was said so far is remembered")
            screen.type(f"/stats\r/save {saved}\r")
            screen.wait("answering")
            screen.wait("saved;")
            screen.type("/rest\r")
            screen.wait("did you mean /reset?")
            screen.type("/reset\r")
            screen.wait("forgotten")
            screen.type(f"/load {saved}\r")
            screen.wait("nothing was read again")
            screen.wait(READY)  # before it, the terminal itself would take Ctrl-D
            screen.type("\x04")
            assert screen.status() == 0
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600
        history = (tmp_path / "chat_history").read_text()
        assert "+Once upon" in history and "+a time" in history


class Terminal:
    """The program with a pseudo-terminal for its input and output."""

    def __init__(self, arguments, folder):
        self.arguments, self.folder, self.seen, self.mark = arguments, folder, "", 0

    def __enter__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MM_CACHE": str(self.folder),
                                    "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-m", "mmcli", *self.arguments], environment)
        return self

    def __exit__(self, *_):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.master)

    def type(self, keys):
        os.write(self.master, keys.encode())

    def wait(self, text, seconds=60.0):
        """Until `text` is printed, after what was waited for before."""
        end = time.monotonic() + seconds
        while (at := self.seen.find(text, self.mark)) < 0:
            assert time.monotonic() < end, f"{text!r} never came after {self.seen[self.mark:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
        self.mark = at + len(text)

    def status(self, seconds=60.0):
        end = time.monotonic() + seconds
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < end, "the program did not end"
            time.sleep(0.05)
        status = found[1]
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

"""Turns of a conversation -> token ids, for models trained on conversations, and plain continuation for the others.

A checkpoint that was trained on conversations carries a chat template (jinja text). It is rendered with marks in
the place of what was said, and only the template's own text may turn into control tokens: a message that spells
"<|eot_id|>" stays words, as in training. A turn hands the model only what came after its last answer; everything
before lies in its memories already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmcore.data.tokenizer import StreamDecoder, Tokenizer
from mmcore.errors import CheckpointError, ConfigError
from mmcore.generation.engine import GREEDY, Progress, Session, check_length, default_stop_ids
from mmcore.generation.sampling import Sampling

if TYPE_CHECKING:
    from mmcore.model.language_model import LanguageModel

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

_TEMPLATE_FAULTS = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError
)
"""What a template can raise while it runs in the sandbox."""
_MARK = re.compile("\ue000([0-9]+)\ue001")


class ChatTemplate:
    """A chat template with the tokenizer that it is for. Raises ConfigError for a template that cannot be used.

    The template is a program from a checkpoint: it runs in jinja's immutable sandbox and sees roles and marks.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        self._controls = tokenizer.model.controls
        names = sorted(filter(None, self._controls), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the checkpoint's chat template is no jinja text ({error}): export it again") from None
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        _, closing = self._halves(example, 1, ask=False)
        first = self._encode_template(closing)[:1]
        self.end_of_turn: int | None = first[0] if first and first[0] in self._controls.values() else None

    def ids(self, messages: list[Message], after: int | None = None) -> list[int]:
        """The ids that ask for the answer to `messages`; `after`: only those that follow the content of that one."""
        text = self._render(messages, ask=True) if after is None else self._halves(messages, after, ask=True)[1]
        ids, end = [], 0
        for mark in _MARK.finditer(text):
            ids += self._encode_template(text[end : mark.start()])
            ids += self.tokenizer.encode(messages[int(mark[1])]["content"])
            end = mark.end()
        return ids + self._encode_template(text[end:])

    def _render(self, messages: list[Message], ask: bool) -> str:
        marked = [{"role": message["role"], "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
        names = {"bos_token": self.tokenizer.bos_token or "", "eos_token": self.tokenizer.eos_token or ""}
        try:
            text = self._template.render(messages=marked, add_generation_prompt=ask, **names)
        except _TEMPLATE_FAULTS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(f"the checkpoint's chat template fails on the turns {roles} ({error})") from None
        found = [int(mark) for mark in _MARK.findall(text)]
        if sorted(found) != list(range(len(messages))):
            raise ConfigError("the checkpoint's chat template drops or repeats messages: mm chat cannot follow it")
        return text

    def _halves(self, messages: list[Message], at: int, ask: bool) -> tuple[str, str]:
        """The rendered text before and after the content of message `at`."""
        before, after = self._render(messages, ask).split(f"\ue000{at}\ue001")
        return before, after

    def _encode_template(self, text: str) -> list[int]:
        """Ids of the template's own text, where names of control tokens stand for those tokens."""
        ids, end = [], 0
        for name in self._names.finditer(text):
            ids += [*self.tokenizer.encode(text[end : name.start()]), self._controls[name[0]]]
            end = name.end()
        return ids + self.tokenizer.encode(text[end:])


class Conversation:
    """A session that speaks words: what is said goes in, a stream of whole characters comes out.

    `template` is None for a base model, which goes on with the text as it stands. `messages` holds what was said;
    `ended` tells why the last answer did: "stop" (the model ended it), "length", or None while it goes on or when
    it was left; `answer_ids` are its ids. Raises ConfigError where tokenizer and model do not fit together.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, system: str | None = None) -> None:
        tokenizer.check_fits(model.config.vocab_size)
        self.tokenizer = tokenizer
        source = tokenizer.chat_template
        self.template = None if source is None else ChatTemplate(source, tokenizer)
        if system is not None and self.template is None:
            raise ConfigError("this is a base model, which continues text and knows no system message: leave it out")
        self.system = system
        self.session = Session(model, vocab_size=tokenizer.vocab_size)
        ends = {tokenizer.eos_id, self.template.end_of_turn if self.template else None}
        self.stop_ids = default_stop_ids(model) | (ends - {None})
        self._begin()

    def reset(self) -> None:
        """Forget everything that was said."""
        self.session.reset()
        self._begin()

    def say(
        self, text: str, max_new_tokens: int, sampling: Sampling = GREEDY, progress: Progress | None = None
    ) -> Iterator[str]:
        """Say `text` and stream the answer; the pieces may be empty while a character is still missing bytes.

        With a base model the text is put behind all before it, and an empty one just goes on. The stream may be
        left at any piece. Raises ConfigError for an empty text, and DataError for one that is no Unicode.
        """
        check_length(max_new_tokens)
        if self.template is not None:
            text = text.strip()
            if not text:
                raise ConfigError("there is nothing to answer: write some text")
        question, answer = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        ids = self._ids_of(question)
        self.session.append(ids)
        self.messages += [question, answer]
        for token in ids:
            self._decoder.push(token)  # an answer may complete a character, or a space, that the text began
        self.ended, self.answer_ids = None, []
        return self._answer(answer, self.session.stream(max_new_tokens, sampling, self.stop_ids, progress))

    def save(self, path: str | Path) -> None:
        """Write the conversation and the memories to one file. Raises CheckpointError."""
        extra = {"messages": self.messages, "chat": self.template is not None, "tokenizer": self.tokenizer.fingerprint}
        self.session.save(path, extra)

    def load(self, path: str | Path) -> None:
        """Go on with a saved conversation. Raises CheckpointError, and then nothing has changed."""
        messages: list[Message] = []

        def check(extra: dict[str, Any]) -> None:
            mine = (self.tokenizer.fingerprint, self.template is not None)
            if (extra.get("tokenizer"), extra.get("chat")) != mine:
                raise CheckpointError(f"{path} was saved with another tokenizer or chat template: load that checkpoint")
            messages.extend(_checked_messages(extra.get("messages"), path))

        self.session.load(path, check)
        self._begin()
        self.messages = messages
        self._decoder = StreamDecoder(self.tokenizer, continues=True)

    def _begin(self) -> None:
        self.messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.ended: str | None = None
        self.answer_ids: list[int] = []
        self._decoder = StreamDecoder(self.tokenizer)

    def _ids_of(self, question: Message) -> list[int]:
        """What the model is to read before it answers."""
        if self.template is None:
            fresh = not self.session.length and self.tokenizer.bos_id is not None
            return [self.tokenizer.bos_id] * fresh + self.tokenizer.encode(question["content"])
        answered = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self.template.ids([*self.messages, question], after=answered[-1] if answered else None)

    def _answer(self, answer: Message, stream: Iterator[int]) -> Iterator[str]:
        for token in stream:
            if token in self.stop_ids:
                self.ended = "stop"
                piece = self._decoder.finish()
            else:
                self.answer_ids.append(token)
                piece = self._decoder.push(token)
            answer["content"] += piece
            yield piece
        self.ended = self.ended or "length"


def _checked_messages(messages: Any, path: str | Path) -> list[Message]:
    """Messages from a file. Raises CheckpointError where they are anything but roles and texts."""
    try:
        found = [{"role": message["role"], "content": message["content"]} for message in messages]
        whole = all(isinstance(text, str) for message in found for text in message.values())
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path} holds no messages that can be read: load another saved session")
    return found


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)

"""A checkpoint's chat template: messages -> the token ids that ask for the answer.

The template (jinja text) is rendered with what was said, and only its own text may turn into control tokens: a message
that spells "<|eot_id|>" stays words, as in training. Text between two control tokens is encoded as a whole, as
transformers does, and training (conversations.py).
"""

from __future__ import annotations

import functools
import itertools
import re
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension

from mmcore.data.tokenizer import Tokenizer
from mmcore.errors import ConfigError
from mmcore.generation.template_sandbox import MOST_TEXT, Sandbox, up_to

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

_FAULTS = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError,
    RuntimeError, SyntaxError,
)  # fmt: skip
"""What a template can raise while it is compiled, and while it runs in the sandbox."""


class ChatTemplate:
    """A chat template with the tokenizer that it is for. Raises ConfigError for a template that cannot be used.

    The template is a program from a checkpoint: it runs in a sandbox, with bounds, and sees roles and texts.
    `end_of_turn` is the control token that it writes behind an answer, or None.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._source = source
        self._controls = tokenizer.model.controls
        names = sorted(filter(None, self._controls), key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._template = compiled(source)
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        first = self._ids(example, 1, ask=False)[:1]
        self.end_of_turn: int | None = first[0] if first and first[0] in self._controls.values() else None

    def ids(self, messages: list[Message], after: int | None = None) -> list[int]:
        """The ids that ask for the answer to `messages`; `after`: only those that follow the content of that one.
        Raises ConfigError where the template fails on them, and DataError for a text that is no Unicode."""
        return self._ids(messages, after, ask=True)

    def _ids(self, messages: list[Message], after: int | None, ask: bool) -> list[int]:
        # `cut` breaks names of control tokens in what was said, `mark` stands in its place.
        cut, mark = _unused([self._source, *(message["content"] for message in messages)])
        marks = [f"{mark}{i}{mark}" for i in range(len(messages))]
        # What is blank stays so, for a template may leave it out.
        hidden = [marks[i] if m["content"].strip() or i == after else m["content"] for i, m in enumerate(messages)]
        shape = self._render(messages, hidden, ask)
        if any(shape.count(text) != 1 for text in marks if text in hidden):
            raise ConfigError("the checkpoint's chat template drops or repeats messages: mm chat cannot follow it")
        said = [self._names.sub(lambda name: cut.join(name[0]), message["content"]) for message in messages]
        if after is not None:
            said[after] = marks[after]
        text = self._render(messages, said, ask)
        if after is not None:
            text, shape = text.partition(marks[after])[2], shape.partition(marks[after])[2]
        # Halves of a name, one the template's and one said, would not be noticed otherwise.
        if self._names.findall(text) != self._names.findall(shape):
            raise ConfigError("the checkpoint's chat template makes other control tokens of this text than of any other: "
                              "mm chat cannot follow it")
        return self._encode(text, cut, continues=after is not None)

    def _render(self, messages: list[Message], contents: list[str], ask: bool) -> str:
        rows = [{"role": message["role"], "content": text} for message, text in zip(messages, contents, strict=True)]
        return rendered(self._template, rows, ask, self.tokenizer.bos_token, self.tokenizer.eos_token)

    def _encode(self, text: str, cut: str, continues: bool) -> list[int]:
        """Ids of rendered text, where names of control tokens stand for those tokens."""
        ids, end, encode = [], 0, functools.partial(self.tokenizer.encode, continues=continues)
        for name in [*self._names.finditer(text), None]:
            part = text[end : name.start() if name else len(text)].replace(cut, "")
            if part:
                ids += encode(part)
            if name:
                ids.append(self._controls[name[0]])
                end, encode = name.end(), self.tokenizer.encode_after_control
        return ids


def compiled(source: str) -> jinja2.Template:
    """A chat template in jinja's sandbox, with what transformers gives to one. Raises ConfigError."""
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    sandbox.globals["raise_exception"] = _raise_template_error
    sandbox.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return sandbox.from_string(source)
    except _FAULTS as error:
        raise ConfigError(f"the checkpoint's chat template is no jinja text ({error}): export it again") from None


def rendered(
    template: jinja2.Template, messages: list[Message], add_generation_prompt: bool, begin: str | None, end: str | None
) -> str:
    """The text of a template that `compiled` gave; `begin` and `end` name those tokens. Raises ConfigError."""
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt,
              "bos_token": begin or "", "eos_token": end or ""}  # fmt: skip
    most = MOST_TEXT + 8 * sum(len(message["content"]) for message in messages)
    template.environment.begin(most)
    try:
        return "".join(up_to(most, template.generate(values)))
    except _FAULTS as error:
        roles = ", ".join(message["role"] for message in messages)
        told = str(error) or "it needs more memory than there is"
        raise ConfigError(f"the checkpoint's chat template fails on the turns {roles} ({told})") from None


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks an answer for whoever trains on it; the text is the same."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return caller()


def _unused(texts: list[str]) -> tuple[str, str]:
    """Two characters that none of the texts has."""
    used = set().union(*texts)
    first, second = itertools.islice((c for c in map(chr, range(0xE000, 0x110000)) if c not in used), 2)
    return first, second


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)

"""Conversations: rows {"messages": [{"role": ..., "content": ...}, ...]} as tokens and a loss mask.

A message becomes <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>, a conversation is framed by the
begin and end tokens, and the loss is on the assistant's words and the <|eot_id|> that closes them. The header's
line breaks and the content are encoded apart, as they are when a model is prompted with a header and answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmcore.errors import DataError

if TYPE_CHECKING:
    from mmcore.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The same format as jinja text, for chat_template in an exported checkpoint."""


def check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """The messages of a row, checked and reduced to role and content; `where` names the row in the error.

    Raises DataError for anything but a list of messages with known roles and text, a system message anywhere but
    first, or no assistant message (there would be nothing to learn).
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one message")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DataError(f"{where}: message {number} is no object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"{where}: message {number} has the role {role!r}: use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"{where}: the content of message {number} must be text")
        if role == "system" and number > 1:
            raise DataError(f"{where}: message {number} is a system message, which can only come first")
        checked.append({"role": role, "content": content})
    if all(message["role"] != "assistant" for message in checked):
        raise DataError(f"{where} has no assistant message, so there is nothing to learn from it: remove the row")
    return checked


class ChatFormat:
    """Turns messages into ids with one tokenizer. Raises DataError where it lacks the chat tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        ids = {}
        for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
            index = tokenizer.special(name)
            if index is None:
                raise DataError(
                    f"{tokenizer.origin} has no token {name}, which conversations need: use a tokenizer with Llama 3's "
                    f"chat tokens, such as one trained by mm"
                )
            ids[name] = index
        self.header_start = ids["<|start_header_id|>"]
        self.header_end = ids["<|end_header_id|>"]
        self.end_of_turn = ids["<|eot_id|>"]
        self._line_breaks = tokenizer.encode("\n\n")

    def header(self, role: str) -> list[int]:
        """The ids that open a message of `role`; the message's words follow."""
        return [self.header_start, *self.tokenizer.encode(role), self.header_end, *self._line_breaks]

    def message(self, role: str, content: str) -> list[int]:
        """The ids of a whole message, closed by <|eot_id|>."""
        return [*self.header(role), *self.tokenizer.encode(content), self.end_of_turn]

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids that ask for the assistant's next message: begin token, messages, the assistant's header."""
        ids = [self.tokenizer.frame()[0]]
        for message in messages:
            ids += self.message(message["role"], message["content"])
        return ids + self.header("assistant")

    def conversation(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Ids of the framed conversation, and for each whether the loss counts it as a target."""
        begin, end = self.tokenizer.frame()
        ids, trained = [begin], [False]
        for message in messages:
            head = self.header(message["role"])
            words = [*self.tokenizer.encode(message["content"]), self.end_of_turn]
            ids += head + words
            trained += [False] * len(head) + [message["role"] == "assistant"] * len(words)
        return [*ids, end], [*trained, False]

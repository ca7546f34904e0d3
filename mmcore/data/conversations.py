"""Conversations: rows {"messages": [{"role": ..., "content": ...}, ...]} as tokens and a loss mask.

A message becomes <|start_header_id|>role<|end_header_id|>\\n\\ncontent<|eot_id|>, a conversation is framed by the
begin and end tokens, and the loss is on the assistant's words and the <|eot_id|> that closes them, but for answers
with "weight": 0. Text that follows a control token is encoded as it is within the whole text (`encode_after_control`),
so that transformers makes the same ids of the chat template. Only an answer is encoded apart from the line breaks of its
header, for a model is asked with these alone, and its words go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcore.data.tokenizer import CHAT_TOKENS, Tokenizer
from mmcore.errors import DataError

ROLES = ("system", "user", "assistant")
_LINE_BREAKS = "\n\n"  # between a header and the words
_FIRST_WORDS = 64  # characters; no tokenizer's pieces reach so far into a text

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The same format as jinja text, for chat_template in an exported checkpoint."""


_OFFERS = ("tools", "functions")
BESIDE_MESSAGES = ("system", *_OFFERS)
"""The fields of a row that say something of its messages."""
_CALLS = ("tool_calls", "function_call")
_NOT_LEARNT = ("reasoning_content", "reasoning", "thinking", "refusal", "audio")  # what others write beside content


def _says(value: Any) -> bool:
    """Whether a field says anything: not where it is empty, or text that stands for nothing."""
    return bool(value) and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def conversation_of(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of a row as `check_messages` gives them; a text `system` beside them becomes the first one.

    Raises DataError also for two different system messages, and for tools that the row offers.
    """
    for key in _OFFERS:
        if _says(row.get(key)):
            raise DataError(
                f"{where} offers tools ({key}), which mm cannot learn to call: remove the row, or leave {key} out of it"
            )
    checked, system = check_messages(row.get("messages"), where), row.get("system")
    if not _says(system):
        return checked
    if not isinstance(system, str):
        raise DataError(f"{where}: system must be text: write it so, or leave it out")
    if checked[0] == {"role": "system", "content": system}:
        return checked
    if checked[0]["role"] == "system":
        raise DataError(f"{where} has a system message and another system beside the messages: leave one of them out")
    return [{"role": "system", "content": system}, *checked]


def check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a row, checked and reduced to role and content, and "weight": 0 of an answer that is not to be
    learnt; `where` names the row in the error.

    Raises DataError for anything but a list of messages with known roles and text, a call of a tool or anything else that
    would be lost, a weight other than 0 and 1, a system message anywhere but first, or no answer to learn.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of at least one message")
    checked = [_check_message(message, number, where) for number, message in enumerate(messages, 1)]
    if all(message["role"] != "assistant" for message in checked):
        raise DataError(f"{where} has no assistant message, so there is nothing to learn from it: remove the row")
    if not any(is_learnt(message) for message in checked):
        raise DataError(f"{where} gives every answer the weight 0, so there is nothing to learn from it: remove the row")
    return checked


def _check_message(message: Any, number: int, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: message {number} is no object with role and content")
    role, content, weight = message.get("role"), message.get("content"), message.get("weight")
    if role not in ROLES:
        raise DataError(f"{where}: message {number} has the role {role!r}: use one of {', '.join(ROLES)}")
    for key in _CALLS:
        if _says(message.get(key)):  # its content is empty as a rule: the model would be taught to answer nothing
            raise DataError(
                f"{where}: message {number} calls a tool ({key}), which mm cannot learn: remove the row, or write the "
                f"call into content and leave {key} out"
            )
    for key in _NOT_LEARNT:
        if _says(message.get(key)):
            raise DataError(
                f"{where}: message {number} has {key}, which mm does not learn: remove the row, or write it into content "
                f"and leave {key} out"
            )
    if not isinstance(content, str):
        raise DataError(f"{where}: the content of message {number} must be text")
    if weight is not None and weight not in (0, 1):
        raise DataError(f"{where}: message {number} has the weight {weight!r}: give 0 (not learnt), 1, or none")
    if role == "system" and number > 1:
        raise DataError(f"{where}: message {number} is a system message, which can only come first")
    checked = {"role": role, "content": content}
    return checked | {"weight": 0} if role == "assistant" and weight == 0 else checked


def is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether the loss is on the words of a message that `check_messages` gave."""
    return message["role"] == "assistant" and message.get("weight") != 0


def missing_token(tokenizer: Tokenizer) -> str | None:
    """The first of the tokens that frame messages which the tokenizer lacks, None where it has them all."""
    return next((name for name in CHAT_TOKENS if tokenizer.special(name) is None), None)


class ChatFormat:
    """Turns messages into ids with one tokenizer. Raises DataError where it lacks the chat tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        if missing := missing_token(tokenizer):
            raise DataError(
                f"{tokenizer.origin} has no token {missing}, which conversations need: use a tokenizer with Llama 3's "
                f"chat tokens, such as one trained by mm"
            )
        self.header_start, self.header_end, self.end_of_turn = map(tokenizer.model.controls.__getitem__, CHAT_TOKENS)

    def header(self, role: str, begun: str = "") -> list[int]:
        """The ids that open a message of `role`, and of what it says first."""
        encode = self.tokenizer.encode_after_control
        return [self.header_start, *encode(role), self.header_end, *encode(_LINE_BREAKS + begun)]

    def message(self, role: str, content: str) -> list[int]:
        """The ids of a whole message, closed by <|eot_id|>."""
        head, words = self._parts(role, content)
        return head + words

    def _parts(self, role: str, content: str) -> tuple[list[int], list[int]]:
        """The ids of a message in two parts, the second of which an assistant learns."""
        if role == "assistant":
            return self.header(role), [*self.tokenizer.encode(content, continues=True), self.end_of_turn]
        return self.header(role, content), [self.end_of_turn]

    def is_same_apart(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether `conversation` gives the ids of roles, line breaks and contents that are encoded each as a text of its
        own, which it did once. How a content begins decides that: what is blank there, and a word or a few."""
        if self.tokenizer.model.leading_space:
            return False
        breaks, encode = self.tokenizer.encode(_LINE_BREAKS), self.tokenizer.encode
        said = (message["content"] for message in messages if message["role"] != "assistant")
        begun = (text[: len(text) - len(text.lstrip()) + _FIRST_WORDS] for text in said)
        return all(encode(_LINE_BREAKS + text) == breaks + encode(text) for text in begun)

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids that ask for the assistant's next message: begin token, messages, the assistant's header."""
        ids = [self.tokenizer.frame()[0]]
        for message in messages:
            ids += self.message(message["role"], message["content"])
        return ids + self.header("assistant")

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        """Ids of the framed conversation, and for each whether the loss counts it as a target."""
        begin, end = self.tokenizer.frame()
        ids, trained = [begin], [False]
        for message in messages:
            head, words = self._parts(message["role"], message["content"])
            ids += head + words
            trained += [False] * len(head) + [is_learnt(message)] * len(words)
        return [*ids, end], [*trained, False]

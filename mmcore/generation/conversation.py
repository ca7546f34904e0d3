"""Turns of a conversation -> token ids, for models trained on conversations, and plain continuation for the others.

A checkpoint that was trained on conversations carries a chat template (chat_template.py). A turn hands the model only
what came after its last answer; everything before lies in its memories already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcore.data.tokenizer import StreamDecoder, Tokenizer
from mmcore.errors import CheckpointError, ConfigError
from mmcore.generation.chat_template import ChatTemplate, Message
from mmcore.generation.engine import GREEDY, Progress, Session
from mmcore.generation.requests import check_length, default_stop_ids
from mmcore.generation.sampling import Sampling

if TYPE_CHECKING:
    from mmcore.model.language_model import LanguageModel


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
        if source is None and tokenizer.other_templates:
            names = ", ".join(map(repr, tokenizer.other_templates))
            raise ConfigError(f"{tokenizer.origin} names its chat templates {names} and none 'default': rename the one for "
                              "conversations in tokenizer_config.json")
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
        left at any piece. Raises ConfigError for a blank text, and DataError for one that is no Unicode.
        """
        check_length(max_new_tokens)
        if self.template is not None and not text.strip():
            raise ConfigError("there is nothing to answer: write some text")
        question, answer = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        ids = self._ids_of(question)
        # A question that is read in one piece cannot be left within: it needs no mark, which costs some memory.
        long = self.session.waiting + len(ids) >= self.session.chunk
        self._before = (self.session.mark(), self._decoder.copy(), self.ended, self.answer_ids) if long else None
        self.session.append(ids)
        self.messages += [question, answer]
        for token in ids:
            self._decoder.push(token)  # an answer may complete a character, or a space, that the text began
        self.ended, self.answer_ids = None, []
        return self._answer(answer, self.session.stream(max_new_tokens, sampling, self.stop_ids, progress))

    def take_back(self) -> None:
        """Unsay the last question, of which the model has not read all: as if it had not been said. Raises ConfigError
        where there is none."""
        if self._before is None:
            raise ConfigError("there is no question that is still being read: /reset forgets everything")
        mark, self._decoder, self.ended, self.answer_ids = self._before
        self._before = None
        self.session.rewind(mark)
        del self.messages[-2:]

    def save(self, path: str | Path, settings: dict[str, Any] | None = None) -> None:
        """Write the conversation and the memories to one file. Raises CheckpointError.

        settings: what answers are drawn with (JSON values), for `load` to return: with another seed others would follow.
        """
        extra = {"messages": self.messages, "chat": self.template is not None, "tokenizer": self.tokenizer.fingerprint}
        self.session.save(path, extra | {"settings": settings})

    def load(self, path: str | Path, check: Callable[[Any], Any] | None = None) -> Any:
        """Go on with a saved conversation, and return the settings that were saved with it; None where none were.

        `check` is called with such settings, and raises ConfigError for what cannot be used. Raises CheckpointError, and
        then nothing has changed.
        """
        messages: list[Message] = []

        def check_all(extra: dict[str, Any]) -> None:
            mine = (self.tokenizer.fingerprint, self.template is not None)
            if (extra.get("tokenizer"), extra.get("chat")) != mine:
                raise CheckpointError(f"{path} was saved with another tokenizer or chat template: load that checkpoint")
            messages.extend(_checked_messages(extra.get("messages"), path))
            try:
                if check and extra.get("settings") is not None:
                    check(extra["settings"])
            except ConfigError as error:
                raise CheckpointError(f"{path} holds settings that cannot be used: {error}") from None

        extra = self.session.load(path, check_all)
        self._begin()
        self.messages = messages
        self._decoder = StreamDecoder(self.tokenizer, continues=True)
        return extra.get("settings")

    def _begin(self) -> None:
        self.messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.ended: str | None = None
        self.answer_ids: list[int] = []
        self._before: tuple[Any, ...] | None = None
        self._decoder = StreamDecoder(self.tokenizer)

    def _ids_of(self, question: Message) -> list[int]:
        """What the model is to read before it answers."""
        if self.template is None:
            begun = self.session.length > 0
            ids = self.tokenizer.encode(question["content"], continues=begun)
            return ids if begun or self.tokenizer.bos_id is None else [self.tokenizer.bos_id, *ids]
        answered = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self.template.ids([*self.messages, question], after=answered[-1] if answered else None)

    def _answer(self, answer: Message, stream: Iterator[int]) -> Iterator[str]:
        for token in stream:
            self._before = None  # the question was read: what it took to unsay it may go
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

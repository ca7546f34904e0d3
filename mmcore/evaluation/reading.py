"""What the suites ask of a model, in text; and the real one behind it.

The suites know nothing of tokens but their number. That keeps a text's tokenization in one place and lets a test put
an oracle where the model is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mmcore.evaluation.prefix import Cursor, shared_length
from mmcore.generation.engine import PREFILL_CHUNK, Session
from mmcore.generation.requests import default_stop_ids

_PLAIN_SPACE = re.compile(r"(?<=\S) (?=\S)")
_TAIL = 160
"""Characters at the end of a text that are encoded again with what comes after them."""


class Reader(Protocol):
    """A model that reads and writes text."""

    def count(self, text: str) -> int:
        """Tokens of a text, the begin token not counted."""

    def hold(self, text: str) -> None:
        """Prompts to come begin with `text`: read it now, once."""

    def complete(self, prompt: str, max_new_tokens: int, enough: Callable[[str], bool]) -> str:
        """The most likely text after the prompt, token by token, until the model ends it, the tokens are spent, or
        `enough` says of what there is that more of it would change nothing."""

    def choose(self, prompt: str, endings: Sequence[str]) -> list[float]:
        """Log-likelihood of each ending behind the prompt, in nats. An ending is scored whole: all its tokens."""


class ModelReader:
    """A Reader from a language model and its tokenizer; every prompt is a document from its begin token on."""

    def __init__(self, model: Any, tokenizer: Any, chunk: int = PREFILL_CHUNK, copies_bytes: int | None = None) -> None:
        self.model, self.tokenizer, self.chunk = model, tokenizer, chunk
        begin, end = tokenizer.frame()
        self._begin = [begin]
        self._stops = default_stop_ids(model) | {end}
        self.cursor = Cursor(model, chunk, copies_bytes)
        self._held: tuple[str, list[int]] = ("", [])

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def hold(self, text: str) -> None:
        ids = self.tokenizer.encode(text)
        self._held = (text, ids)
        # The last tokens may come out otherwise once more text follows.
        if len(ids) > 8:
            self.cursor.seek(self._begin + ids[:-8])

    def complete(self, prompt: str, max_new_tokens: int, enough: Callable[[str], bool] = lambda _: False) -> str:
        session = Session(self.model, vocab_size=self.tokenizer.vocab_size, chunk=self.chunk)
        session.feed(self._begin + self.tokenizer.encode(prompt))
        ids: list[int] = []
        text = ""
        for token in session.stream(max_new_tokens, stop_ids=self._stops):
            if token in self._stops:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids, continues=True)
            if enough(text):
                break
        return text

    def choose(self, prompt: str, endings: Sequence[str]) -> list[float]:
        """As Reader says. The tokens are those of the whole text, prompt and ending encoded together; scored are all
        that come after the tokens which the prompt alone and every filled-in prompt have in common."""
        held, held_ids = self._held
        if held and prompt.startswith(held):
            ids = extend(self.tokenizer, held, held_ids, [prompt[len(held):]])[0]
        else:
            ids = self.tokenizer.encode(prompt)
        wholes = extend(self.tokenizer, prompt, ids, endings)
        start = shared_length([ids, *wholes])
        context = self._begin + ids[:start]
        return [one.logprob for one in self.cursor.score(context, [whole[start:] for whole in wholes])]


def extend(tokenizer: Any, text: str, ids: list[int], more: Sequence[str]) -> list[list[int]]:
    """`encode(text + one)` for each of `more`, where `ids` is `encode(text)`; only the end of a long text is encoded
    again.

    Words are encoded by themselves by all of this field's tokenizers, so a text can be cut before a word: where its
    end, encoded alone, gives the very tokens that `ids` ends with, what precedes them does not depend on what follows.
    Where it does not, everything is encoded.
    """
    cut = next((match.start() for match in _PLAIN_SPACE.finditer(text, max(0, len(text) - _TAIL))), None)
    if cut:
        tail = text[cut + 1:] if tokenizer.model.leading_space else text[cut:]
        alone, *longer = tokenizer.encode_batch([tail, *(tail + one for one in more)])
        if alone and ids[-len(alone):] == alone:
            return [ids[: -len(alone)] + whole for whole in longer]
    return tokenizer.encode_batch([text + one for one in more])

"""Generation on token ids: prompts in chunks, then one token at a time from a state that is never re-read.

Shape suffixes: B rows of a batch, T tokens, V vocabulary. The model is anything with `config.vocab_size`,
`parameters`, `new_state`, `advance` and `takes_back` (`mmcore.model.build_model`, `mmcore.load_model`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcore.errors import CheckpointError, ConfigError
from mmcore.generation import history as files
from mmcore.generation import sampling as drawing
from mmcore.generation.requests import check_length, checked_ids, checked_stop_ids, default_stop_ids, drawable
from mmcore.generation.sampling import Draw, Sampling, uniform

if TYPE_CHECKING:
    from mmcore.model.language_model import LanguageModel

PREFILL_CHUNK = 2048
"""Tokens of a prompt read in one pass: long enough for matrix products at full speed, short enough to stop
within a moment and to bound the memory a long prompt takes."""

LEAST_CHUNK = 256
"""Of each row, where many are read together: with fewer, pairs are copied into a kernel's order too often."""


def chunk_of(rows: int) -> int:
    """Tokens of each of so many rows to read in one pass: as many in all as of one row, while that is not too few."""
    return max(LEAST_CHUNK, PREFILL_CHUNK // rows)


GREEDY = Sampling()

Progress = Callable[[int, int], None]
"""Called with (tokens read, tokens to read) after each chunk of a prompt."""


@dataclass
class Stats:
    """What a session has done, in tokens and seconds inside the model and the choice of tokens."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    """Tokens that cost a pass of the model each: all that were drawn, but for the first of each answer."""
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Tokens of prompt a second; 0 before the first."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens of answers a second; 0 before the first."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"{name} is {value!r}: it must be a number, 0 or above")

    def as_dict(self) -> dict[str, float]:
        """The fields and both rates, for JSON."""
        rates = {"prefill_tokens_per_second": self.prefill_rate, "decode_tokens_per_second": self.decode_rate}
        return asdict(self) | rates


class Session:
    """A model and the memories of one text: feed it tokens, stream tokens from it, in any order.

    `history` holds the ids of the text, those that were fed and those that were drawn. A drawn token is read
    into the memories only when something comes after it, so no pass of the model is thrown away, unless the session
    reads `ahead`.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        state: Any = None,
        vocab_size: int | None = None,
        chunk: int = PREFILL_CHUNK,
        ahead: bool | None = None,
    ) -> None:
        """`state`: go on from this one, of batch size 1, which the session changes; none: an empty one.
        `vocab_size`: ids from here on are never drawn (rows of the classifier that no token stands for).
        `ahead`: read a drawn token before it is given out, and where the model can take it back before it is looked at,
        so that a GPU is never idle; where a stream is left or ends early, a pass may have been for nothing. None: on a
        GPU."""
        if chunk < 1:
            raise ConfigError(f"the prefill chunk is {chunk}: it must be at least 1 token")
        self.model = model
        self._device = next(model.parameters()).device  # looked for once: a token takes less than a millisecond
        self._ahead = self._device.type in drawing.ASYNCHRONOUS if ahead is None else ahead
        self.chunk = chunk
        self.vocab_size = drawable(vocab_size, model.config.vocab_size)
        self.reset()
        if state is not None:
            self._state = state

    def reset(self) -> None:
        """Forget everything: an empty text, empty memories, no statistics."""
        self.history: list[int] = []
        self.stats = Stats()
        self._unread: list[int] = []
        self._logits: Tensor | None = None
        self._broken = False
        self._state = self.model.new_state(1)

    @property
    def length(self) -> int:
        """Tokens of the text so far, whatever was in the given state included."""
        return self._state.length + len(self._unread)

    @property
    def waiting(self) -> int:
        """Tokens of the text that are not read yet."""
        return len(self._unread)

    @property
    def state_bytes(self) -> int:
        """Bytes that the memories take."""
        return self._state.bytes

    def append(self, ids: Iterable[int]) -> None:
        """Put ids behind the text without reading them yet. Raises ConfigError for ids the model does not have."""
        ids = checked_ids(ids, self.model.config.vocab_size)
        self.history += ids
        self._unread += ids

    def mark(self) -> tuple[Any, ...]:
        """The present moment, to `rewind` to; see DecodingState.mark."""
        return self._state.mark(), len(self.history), tuple(self._unread), self._logits

    def rewind(self, mark: tuple[Any, ...]) -> None:
        """Forget what was put behind the text after `mark`, also where it was cut off within a token."""
        state, length, unread, self._logits = mark
        self._state.rewind(state)
        del self.history[length:]
        self._unread, self._broken = list(unread), False

    def feed(self, ids: Iterable[int], progress: Progress | None = None) -> None:
        """Put ids behind the text and read them into the memories, a chunk at a time.

        `progress` may raise to stop: what is not read yet then stays behind the text, and is read by whatever
        comes next.
        """
        self.append(ids)
        self._catch_up(progress)

    def stream(
        self,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop_ids: Iterable[int] | Tensor = (),
        progress: Progress | None = None,
    ) -> Iterator[int]:
        """Draw up to `max_new_tokens` ids that go on with the text.

        An id of `stop_ids` ends the stream: it is given out as the last one, but is not put behind the text
        (`append` it where it belongs there). The stream may be left at any id; the session goes on from there.
        Raises ConfigError for settings out of range or an empty text.
        """
        check_length(max_new_tokens)
        if not self._unread and self._logits is None:
            raise ConfigError("the prompt is empty: give at least one token, such as the tokenizer's bos_id")
        return self._stream(max_new_tokens, sampling, checked_stop_ids(stop_ids), progress)

    def save(self, path: str | Path, extra: dict[str, Any] | None = None) -> None:
        """Write text and memories to one file, whole or not at all, with `extra` (JSON values) beside them.

        Raises CheckpointError where the file cannot be written, or exists and is no saved session.
        """
        self._require_whole()
        facts = {"model": files.identity(self.model), "stats": asdict(self.stats), "extra": extra or {}}
        tensors = {f"state.{name}": tensor for name, tensor in self._state.tensors().items()}
        tensors["history"] = torch.tensor(self.history, dtype=torch.int64)
        tensors["unread"] = torch.tensor(self._unread, dtype=torch.int64)
        if self._logits is not None:
            tensors["logits"] = self._logits
        files.write_session(path, tensors, facts)

    def load(self, path: str | Path, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Take text and memories from a file that `save` wrote, and return its `extra`.

        `check` is called with `extra` before anything is taken, and may raise. Raises CheckpointError for a missing,
        damaged or foreign file, or one of another model (other settings, weights, number format, or memories
        knocked out). Whatever is raised, the session is as it was.
        """
        tensors, facts = files.read_session(path)
        files.require_same_model(path, facts["model"], files.identity(self.model))
        if check:
            check(facts["extra"])
        vocabulary = self.model.config.vocab_size
        state = self.model.new_state(1)
        try:
            history = checked_ids(tensors.pop("history").tolist(), vocabulary)
            unread = checked_ids(tensors.pop("unread").tolist(), vocabulary)
            logits = tensors.pop("logits", None)
            if logits is not None and (logits.ndim, len(logits)) != (2, 1):
                raise ConfigError(f"logits of shape {tuple(logits.shape)}")
            tensors = {name.removeprefix("state."): tensor.to(self._device) for name, tensor in tensors.items()}
            self._check_state(tensors)
            state.load(tensors)
            stats = Stats(**facts["stats"])
        except (ConfigError, CheckpointError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} holds no session that this model can go on from: {error}") from None
        self.history, self.stats, self._unread, self._state = history, stats, unread, state
        self._logits = None if logits is None else logits[:, : self.vocab_size].to(self._device)
        self._broken = False
        return facts["extra"]

    def _check_state(self, tensors: dict[str, Tensor]) -> None:
        """Raises CheckpointError where saved tensors are not those of a state of this model, by name and shape."""
        probe = self.model.new_state(1)
        if int(tensors["length"]):
            self.model.advance(torch.zeros(1, 1, dtype=torch.int64, device=self._device), probe)
        mine = probe.tensors()
        if mine.keys() != tensors.keys():
            raise CheckpointError(f"it lacks or adds {min(mine.keys() ^ tensors.keys())}")
        for name, tensor in tensors.items():
            # Pairs are [1, number of pairs, H, D]; all else has one shape.
            free = 1 if name.endswith((".keys", ".values")) else None
            shapes = [[size for axis, size in enumerate(t.shape) if axis != free] for t in (tensor, mine[name])]
            if shapes[0] != shapes[1] or tensor.dtype != mine[name].dtype:
                raise CheckpointError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")

    def _stream(
        self, max_new_tokens: int, sampling: Sampling, stop_ids: frozenset[int], progress: Progress | None
    ) -> Iterator[int]:
        self._catch_up(progress)
        step, sure = _Step(self, None, sampling), True
        for left in range(max_new_tokens - 1, -1, -1):
            unseen = bool(left) and self._ahead and sure and self.model.takes_back(self._state)
            following, token = self._wait(step, sampling, stop_ids, unseen)
            sure = not step.again  # where one word had to be drawn twice, so may the next
            if token in stop_ids:
                yield token
                return
            # In the text only when the pass has begun: what fails before that has not happened.
            if following is None and self._ahead and left:
                following = _Step(self, step.draw.tokens.unsqueeze(0), sampling)
            self.history.append(token)
            if following is None:
                self._unread.append(token)
            yield token
            if not left:
                return
            if self._unread:
                ids, self._unread = self._unread, []
                following = _Step(self, torch.tensor([ids], device=self._device), sampling)
            elif self._logits is None:
                raise ConfigError("the session was reset within a stream: begin another stream")
            elif following is None or self._logits is not following.logits:
                following = _Step(self, None, sampling)  # the text has gone on, or is another, and was read
            step = following

    def _wait(
        self, step: _Step, sampling: Sampling, stop_ids: frozenset[int], unseen: bool
    ) -> tuple[_Step | None, int]:
        """(the step that follows, if it was asked for before the token was known, `unseen`; the token). A GPU is never idle
        then; a token that ends the stream, or fails, has its step taken back."""
        before, following = self._logits, None
        if unseen and step.draw is not None:
            following = _Step(self, step.draw.unseen().unsqueeze(0), sampling)
        token = None
        try:
            token = step.token()
        finally:
            if following is not None and (token is None or token in stop_ids or step.again):
                self._broken = True  # until all of it is undone
                self._state.take_back()
                self._logits, self._broken = before, False
                following.give_up()
                following = None
        return following, token

    def _draw(self, logits_BV: Tensor, sampling: Sampling) -> Draw:
        point = uniform(sampling.seed, self._state.length) if sampling.temperature else 0.0
        return Draw(logits_BV, sampling, [point])

    def _catch_up(self, progress: Progress | None) -> None:
        """Read what is unread, in chunks: `_logits` [1, V] then stand behind the text."""
        total = len(self._unread)
        while self._unread:
            started = time.perf_counter()
            ids, self._unread = self._unread[: self.chunk], self._unread[self.chunk :]
            self._logits = self._read(torch.tensor([ids], device=self._device))
            self.stats.prefill_seconds += time.perf_counter() - started
            self.stats.prefill_tokens += len(ids)
            if progress:
                progress(total - len(self._unread), total)
        if total and self._device.type == "cuda":
            started = time.perf_counter()
            torch.cuda.synchronize(self._device)  # until here the time was the host's, which asks for work and goes on
            self.stats.prefill_seconds += time.perf_counter() - started
        if self._logits is None:
            raise ConfigError("the prompt is empty: give at least one token, such as the tokenizer's bos_id")

    def _read(self, tokens_1T: Tensor) -> Tensor:
        """One pass of the model over the tokens; returns the logits [1, V] behind the last."""
        self._require_whole()
        self._broken = True  # until the pass is over: a Ctrl-C or a lack of memory within leaves half a token
        logits = self.model.advance(tokens_1T, self._state)
        self._broken = False
        return logits if logits.shape[-1] == self.vocab_size else logits[:, : self.vocab_size]

    def _require_whole(self) -> None:
        if self._broken:
            raise ConfigError("the session was cut off within a token: reset it, or load a saved one")


class _Step:
    """A pass of the model over tokens [1, T], or none, and the draw of the next; begun, and waited for by `token`."""

    def __init__(self, session: Session, tokens_1T: Tensor | None, sampling: Sampling) -> None:
        started = time.perf_counter()
        self._session, self._count = session, 0
        self._begun: torch.cuda.Event | None = None
        self.draw: Draw | None = None
        self._error: BaseException | None = None
        if tokens_1T is not None:
            self._count = tokens_1T.shape[1]
            if tokens_1T.is_cuda:
                self._begun = torch.cuda.Event(enable_timing=True)
                self._begun.record(torch.cuda.current_stream(tokens_1T.device))
            session._logits = session._read(tokens_1T)
        self.logits = session._logits
        try:
            self.draw = session._draw(self.logits, sampling)
        except BaseException as error:  # of the next token; the one just read is still to be given out
            self._error = error
        self._seconds = time.perf_counter() - started

    @property
    def again(self) -> bool:
        """Whether the token had to be drawn a second time."""
        return self.draw is not None and self.draw.again

    def give_up(self) -> None:
        """Nobody will ask for the token: of what failed a Ctrl-C is still to be heard."""
        if self._error is not None and not isinstance(self._error, Exception):
            raise self._error

    def token(self) -> int:
        """The id that was drawn. Counts the pass among the session's statistics: what the GPU took, or the host where that
        is more, for whoever looked at the last token meanwhile may have taken longer."""
        if self._error is not None:
            raise self._error
        started = time.perf_counter()
        token = self.draw.ids()[0]
        seconds = self._seconds + time.perf_counter() - started
        if self._count:
            self._session.stats.decode_seconds += max(seconds, self.draw.device_seconds(self._begun))
            self._session.stats.decode_tokens += self._count
        return token


def generate(
    model: LanguageModel,
    prompt_ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Iterable[int] | Tensor | None = None,
    state: Any = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """A stream of ids that go on with `prompt_ids`; see Sampling for the settings.

    An id of `stop_ids` (none: those the model was loaded with) ends the stream and is its last one. `state`, of
    batch size 1, goes on from an earlier text and is changed: afterwards it has read every id but the last one
    given out. It goes with the weights it began with (see LanguageModel.new_state): begin another where they change.
    Settings are checked at once, the model runs as ids are asked for. Raises ConfigError.
    """
    session = Session(model, state=state, vocab_size=vocab_size, ahead=None if state is None else False)
    session.append(prompt_ids)
    sampling = Sampling(temperature, top_k, top_p, seed)
    return session.stream(max_new_tokens, sampling, default_stop_ids(model) if stop_ids is None else stop_ids)

"""lm-evaluation-harness with a model of ours inside, in this process and without the network.

`HarnessModel` is the model in the harness's terms: token for token what its own Hugging Face model scores, with what
requests share read once (prefix.py) and every result kept in a journal.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmcore.errors import ConfigError, DataError
from mmcore.evaluation.intervals import wilson
from mmcore.evaluation.journal import Journal, key_of, shorten
from mmcore.evaluation.persistent import task_files
from mmcore.evaluation.persistent.benchmarks import CODE_TASKS, GROUPS, HARNESS_TASKS, Tasks
from mmcore.evaluation.persistent.local import Items, LocalTask
from mmcore.evaluation.prefix import Cursor, shared_length
from mmcore.generation import chat_template
from mmcore.generation.engine import Session
from mmcore.generation.sampling import Sampling

VERSION = "0.4.13"
DEFAULT_ANSWER_TOKENS = 256
"""Tokens of an answer where a task names no number; the harness's."""
FEWSHOT_SEED = 1234
"""Of the examples that a task shows, where ours is 0; the harness's own."""
LEAST_SHARED = 16
"""Tokens that all contexts must begin with alike before a mark is left behind them."""

try:
    from lm_eval.api.model import TemplateLM as _TemplateLM
except ImportError:
    _TemplateLM = None


def require() -> None:
    """Raises ConfigError where the harness is not installed, or is of another version."""
    if _TemplateLM is None:
        raise ConfigError("the persistent suite needs lm-evaluation-harness: pip install 'mm[harness]'")
    found = importlib.metadata.version("lm_eval")
    if not found.startswith("0.4."):
        raise ConfigError(f"lm-evaluation-harness {found} is installed and {VERSION} needed: pip install 'mm[harness]'")


class Unscorable(DataError):
    """An item of a task is out of this model's reach, whatever the other items and other models are."""


class HarnessModel(_TemplateLM or object):
    """A language model and its tokenizer as the harness asks for them.

    Every text is a document of its own that opens with the begin token. A text longer than `max_length` loses its
    beginning, as in the harness's own model. `tick` is called with the number of finished requests; `task` is named in
    the journal; `seed` is that of answers which a task wants drawn.
    """

    def __init__(
        self, model: Any, tokenizer: Any, journal: Journal | None = None, identity: Any = None,
        tick: Callable[[int], None] | None = None, max_length: int | None = None, task: str = "",
        seed: int = 0,
    ) -> None:
        require()
        super().__init__()
        self.model, self.tokens = model, tokenizer
        self.begin, self.end = tokenizer.frame()
        self.max_length = max_length or model.config.max_position_embeddings
        self.cursor = Cursor(model)
        self._device = next(model.parameters()).device
        self._journal, self._identity, self._tick, self._task = journal, identity, tick, task
        self._seed = seed
        self._done = 0
        self._items: list[int] = []
        """Of the requests at hand, which items they belong to."""
        self.shortened = 0
        """Requests that lost their beginning."""

    @property
    def eot_token_id(self) -> int:
        return self.end

    @property
    def prefix_token_id(self) -> int:
        return self.begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The begin token and the text's tokens; the text's alone where add_special_tokens is False."""
        ids = self.tokens.encode(string)
        return ids if add_special_tokens is False else [self.begin, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The checkpoint's chat template, in the sandbox. Raises ConfigError for a base model, or a faulty template."""
        template = self.tokens.chat_template
        if template is None:
            raise ConfigError("this is a base model without a chat template: leave the template out")
        return chat_template.rendered(
            chat_template.compiled(template), chat_history, add_generation_prompt, None, self.tokens.eos_token
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._items = [request.doc_id for request in requests]
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._items = []

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each (texts, context ids, continuation ids). Raises
        Unscorable, before any is scored, where a continuation has no tokens or more than the model reads."""
        groups: dict[tuple[int, ...], list[int]] = {}
        continuations = []
        for place, (_, context, continuation) in enumerate(requests):
            if not continuation or len(continuation) > self.max_length:
                item = f"{self._task}, item {self._items[place] + 1}: " if self._items else ""
                raise Unscorable(
                    f"{item}an answer of {len(continuation)} tokens cannot be scored, as this model reads 1 to "
                    f"{self.max_length:,}; shorten it, or leave the task out with --tasks"
                )
            whole = list(context) + list(continuation)
            kept = whole[-(self.max_length + 1):]
            self.shortened += len(kept) < len(whole)
            groups.setdefault(tuple(kept[: -len(continuation)]), []).append(place)
            continuations.append(list(continuation))
        found: list[Any] = [None] * len(requests)
        shared = None
        for context, places in groups.items():
            keys = [self._key("loglikelihood", context, continuations[place]) for place in places]
            if not all(self._known(key) for key in keys):
                if shared is None:
                    shared = shared_length(list(groups))
                if LEAST_SHARED <= shared < len(context):
                    self.cursor.seek(context[:shared])
                scored = self.cursor.score(context, [continuations[place] for place in places])
                for key, one, place in zip(keys, scored, places, strict=True):
                    text, ending = requests[place][0] or ("", self.tokens.decode(continuations[place]))
                    self._keep(key, {"prompt": shorten(text), "ending": shorten(ending), "logprob": one.logprob,
                                     "greedy": one.greedy})
            for key, place in zip(keys, places, strict=True):
                record = self._record(key)
                found[place] = (record["logprob"], record["greedy"])
            self._advance(len(places))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, each token once, in windows of `max_length`; the first begins with the begin
        token, which is itself not scored."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = map(make_disjoint_window, get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1,
            ))
            parts = self._loglikelihood_tokens([(None, *window) for window in windows])
            found.append(sum(logprob for logprob, _ in parts))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to the first of the texts it is to stop at."""
        found = []
        for request in requests:
            context, settings = request.args
            until, most, sampling = writing(settings, self.max_length, self._seed)
            ids = self.tok_encode(context)
            self.shortened += len(ids) > self.max_length - most
            ids = ids[-(self.max_length - most):]
            key = self._key("generate", ids, [until, most, vars(sampling)])
            if not self._known(key):
                self._keep(key, {"prompt": shorten(context), "prediction": self._write(ids, until, most, sampling)})
            found.append(self._record(key)["prediction"])
            self._advance(1)
        return found

    def _write(self, ids: list[int], until: list[str], most: int, sampling: Sampling) -> str:
        session = Session(self.model, vocab_size=self.tokens.vocab_size)
        session.feed(ids)
        drawn: list[int] = []
        text = ""
        for token in session.stream(most, sampling, stop_ids={self.end} | set(self.model.stop_ids)):
            if token == self.end or token in self.model.stop_ids:
                break
            drawn.append(token)
            text = self.tokens.decode(drawn)  # as a text of its own, which is how the harness's model decodes
            if any(stop in text for stop in until):
                break
        for stop in until:
            text = text.split(stop)[0]
        return text

    def _key(self, *what: Any) -> str:
        return key_of("persistent", self._identity, self.max_length, *what)

    def _known(self, key: str) -> bool:
        return self._record(key) is not None

    def _record(self, key: str) -> dict[str, Any] | None:
        return self._memory.get(key) if self._journal is None else self._journal.get(key)

    def _keep(self, key: str, record: dict[str, Any]) -> None:
        if self._journal is None:
            self._memory[key] = record
        else:
            self._journal.put(key, {"suite": "persistent", "model": self._identity, "task": self._task} | record)

    @property
    def _memory(self) -> dict[str, dict[str, Any]]:
        """Results where no journal is kept."""
        return self.__dict__.setdefault("_results", {})

    def _advance(self, count: int) -> None:
        self._done += count
        if self._tick:
            self._tick(self._done)


def writing(settings: dict[str, Any], max_length: int, seed: int = 0) -> tuple[list[str], int, Sampling]:
    """Where an answer stops, how many tokens it may have, and how they are drawn, from a task's generation_kwargs."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    settings = normalize_gen_kwargs(settings, DEFAULT_ANSWER_TOKENS)
    until = [stop for stop in handle_stop_sequences(settings.get("until"), eos=None) if stop]
    most = int(settings["max_gen_toks"])
    if most >= max_length:  # no room for a question: a small model is not asked for so long an answer
        most = max_length // 2
    if settings.get("do_sample") and settings.get("temperature"):
        temperature = float(settings["temperature"])
        return until, most, Sampling(temperature, settings.get("top_k"), settings.get("top_p"), seed % 2**64)
    return until, most, Sampling()


def measure(
    tasks: Tasks, model: Any, tokenizer: Any, journal: Journal, identity: Any, limit: int | None = None,
    tick: Callable[[float], None] | None = None, passed_over: list[str] | None = None, seed: int = 0,
) -> list[dict[str, Any]]:
    """A row of plain values for each task: `score` by its main metric, in percent where `percent` says so (a perplexity
    is not), and all metrics. A task that this model cannot score gets no row, and a sentence in `passed_over`; without
    that list it raises Unscorable."""
    require()
    rows: list[dict[str, Any]] = []
    names = [*tasks.local, *tasks.online]
    for number, task in enumerate(names):
        size = min(limit or 10**9, len(task.rows)) if isinstance(task, LocalTask) else limit or 2000

        def report(done: int, number: int = number, size: int = size) -> None:
            if tick:  # a multiple choice asks several times for an item
                tick((number + min(0.99, done / (4 * size))) / len(names))

        name = task.name if isinstance(task, LocalTask) else task
        lm = HarnessModel(model, tokenizer, journal, identity, report, task=name, seed=seed)
        try:
            row = (run_local if isinstance(task, LocalTask) else run_online)(task, lm, limit, seed)
        except Unscorable as error:
            if passed_over is None:
                raise
            passed_over.append(str(error))
            continue
        rows.append(row | {"shortened": lm.shortened})
    return rows


def run_local(task: LocalTask, lm: Any, limit: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Measure a task whose items are at hand; nothing is loaded from anywhere."""
    settings = dict(task.settings) | {
        "task": task.name, "test_split": "test", "fewshot_split": "test",
        "custom_dataset": lambda **_: {"test": Items(task.rows)},
    }
    with _offline(), _sandboxed():
        found = _evaluate([settings], lm, limit, include_defaults=False, seed=seed)
    items = found["n-samples"][task.name]["effective"]
    return _row(task.name, task.group, found["results"][task.name], items) | {"chance": chance(task, items)}


def chance(task: LocalTask, items: int) -> float | None:
    """Percent that guessing gets right in the first `items` of a multiple choice; 0 where an answer is written; None
    where it is not known."""
    if task.settings["output_type"] == "generate_until":
        return 0.0
    choices = [row.get("choices") for row in task.rows[:items]]
    if task.settings["output_type"] != "multiple_choice" or not all(choices):
        return None
    return 100 * sum(1 / len(one) for one in choices) / len(choices)


def run_online(name: str, lm: Any, limit: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Measure one of the harness's own tasks, whose data it loads (from its cache, or the network)."""
    if name in CODE_TASKS and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise ConfigError(
            f"{name} runs programs that the model writes: set HF_ALLOW_CODE_EVAL=1 where that is safe, or leave it out "
            f"with --tasks"
        )
    theirs = HARNESS_TASKS[name]
    try:
        found = _evaluate([theirs], lm, limit, include_defaults=True, seed=seed)
    except (OSError, ValueError) as error:
        raise DataError(f"the harness could not load {theirs} ({' '.join(str(error).split())[:200]}): check the network, "
                        f"or give the file with --data") from error
    results = found.get("groups", {}).get(theirs) or found["results"][theirs]
    items = sum(counts["effective"] for counts in found["n-samples"].values())
    return _row(name, GROUPS[name], results, items)


def _evaluate(tasks: list[Any], lm: Any, limit: int | None, include_defaults: bool, seed: int = 0) -> dict[str, Any]:
    """The harness's evaluation, with its own seed of examples where ours is 0. Its `simple_evaluate` would also seed every
    generator of the process and run git."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    loaded = TaskManager(include_defaults=include_defaults).load(tasks)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED + seed)
        task.aggregation().update({name: _unbounded(one) for name, one in task.aggregation().items()})
    allowed = os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
    with _quiet():
        return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, confirm_run_unsafe_code=allowed)


def _unbounded(aggregate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """An aggregation that is infinite where a perplexity goes beyond what a float holds, as a page of one long word has."""

    @functools.wraps(aggregate)
    def bounded(items: Any) -> Any:
        try:
            return aggregate(items)
        except OverflowError:
            return math.inf

    return bounded


def _row(name: str, group: str, results: dict[str, Any], items: int) -> dict[str, Any]:
    """The harness's results of a task; the main metric is acc_norm, acc, exact_match, or the first there is."""
    metrics = {key.replace(",none", ""): value for key, value in results.items()
               if isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in key
               and key not in ("sample_len", "sample_count")}
    if not metrics:
        raise DataError(f"the harness gave no figure for {name}: check the task's metric_list")
    order = ("acc_norm", "acc", "exact_match")
    main = min(metrics, key=lambda key: next((i for i, word in enumerate(order) if key.startswith(word)), len(order)))
    percent = main.split(",")[0] in (*order, "f1", "pass@1")
    row = {"task": name, "group": group, "metric": main.split(",")[0], "percent": percent, "items": items,
           "score": (100 if percent else 1) * metrics[main], "metrics": metrics, "interval": None, "chance": None}
    if percent:
        row["interval"] = [100 * end for end in wilson(metrics[main] * items, items)]
    return row


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """The Hugging Face libraries do not ask the network."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _sandboxed() -> Iterator[None]:
    """The harness renders a task's templates in jinja's sandbox: its own environment would let them reach Python."""
    from lm_eval import utils

    before, utils.env = utils.env, task_files.sandbox()
    try:
        yield
    finally:
        utils.env = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's own progress bars: there is one for the whole."""
    from lm_eval.api import task as module

    before, module.tqdm = module.tqdm, functools.partial(module.tqdm, disable=True)
    try:
        yield
    finally:
        module.tqdm = before

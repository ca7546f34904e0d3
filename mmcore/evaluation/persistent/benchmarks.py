"""The paper's benchmarks, and those of them that can be read from local files in their original layouts.

The paper divides its 19 benchmarks into 13 that rest on persistent knowledge, whose scores hardly change when the
long-term memories are removed, and 6 that read or reason over a context, whose scores fall (tables 2 and 9).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmcore.checkpoint.disk import hash_file
from mmcore.errors import ConfigError, DataError
from mmcore.evaluation.persistent import task_files
from mmcore.evaluation.persistent.local import LocalTask, Rows, read_rows

PERSISTENT, CONTEXTUAL = "persistent", "contextual"
"""Groups besides OWN: the paper's 13, and its other 6."""

HARNESS_TASKS = {
    "openbookqa": "openbookqa", "arc_easy": "arc_easy", "arc_challenge": "arc_challenge", "winogrande": "winogrande",
    "piqa": "piqa", "boolq": "boolq", "hellaswag": "hellaswag", "nq_open": "nq_open", "siqa": "social_iqa",
    "triviaqa": "triviaqa", "gsm8k": "gsm8k", "mmlu": "mmlu", "humaneval_plus": "humaneval_plus",
    "squad": "squadv2", "bbh": "bbh", "math": "hendrycks_math", "mbpp": "mbpp", "race_middle": None, "race_high": "race",
}
"""Ours -> lm-evaluation-harness's own definition, in the paper's order. It has none of race_middle, which is read from
files alone."""
CODE_TASKS = ("humaneval_plus", "mbpp")
"""Tasks that run the programs a model writes; the harness wants HF_ALLOW_CODE_EVAL=1 for them."""

GROUPS = {name: PERSISTENT if place < 13 else CONTEXTUAL for place, name in enumerate(HARNESS_TASKS)}
NAMES = tuple(HARNESS_TASKS)

_ACCURACY = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
_CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}", "metric_list": _ACCURACY,
}
_SHORT_ANSWER = {
    "output_type": "generate_until", "description": "Answer these questions:\n\n", "doc_to_text": "{{query}}",
    "doc_to_target": "{{answers}}", "fewshot_delimiter": "\n", "target_delimiter": " ",
    "generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "temperature": 0.0},
    "filter_list": [{"name": "remove_whitespace",
                     "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
                     "ignore_punctuation": True, "regexes_to_ignore": [r"\b(?:The |the |An |A |The |a |an )"]}],
}

@dataclass(frozen=True)
class Tasks:
    """What the persistent suite measures."""

    local: tuple[LocalTask, ...] = ()
    online: tuple[str, ...] = ()
    """Names of HARNESS_TASKS to be loaded by the harness."""
    notes: tuple[str, ...] = ()
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)

    def cost(self, limit: int | None) -> float:
        """About how many tokens are read."""
        items = sum(min(limit or len(task.rows), len(task.rows)) for task in self.local)
        return 200.0 * (items + len(self.online) * (limit or 2000))


@dataclass(frozen=True)
class _Local:
    """Where a benchmark's file is, and how its lines become items."""

    files: tuple[str, ...]
    read: Callable[[Path], Rows]
    settings: dict[str, Any]


def _piqa(path: Path) -> Rows:
    answers = path.with_name(path.name.replace(".jsonl", "-labels.lst"))
    if not answers.is_file():
        raise DataError(f"{path} has its answers in {answers.name}, which is missing: put it beside")
    gold = answers.read_text(encoding="utf-8-sig").split()
    rows = read_rows(path)
    if len(gold) != len(rows):
        raise DataError(f"{path} has {len(rows)} questions and {answers.name} {len(gold)} answers: get both anew")
    return [{"query": f"Question: {row['goal']}\nAnswer:", "choices": [row["sol1"], row["sol2"]], "gold": int(answer)}
            for row, answer in zip(rows, gold, strict=True)]


def _hellaswag(path: Path) -> Rows:
    def tidy(text: str) -> str:
        """Marks of WikiHow's layout go."""
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    return [{"query": tidy(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
             "choices": [tidy(ending) for ending in row["endings"]], "gold": int(row["label"])} for row in read_rows(path)]


def _science(query: str) -> Callable[[Path], Rows]:
    """ARC and OpenBookQA: AllenAI's layout, or questions with their answers in one instruction."""

    def read(path: Path) -> Rows:
        rows = []
        for number, row in enumerate(read_rows(path), start=1):
            if "instruction" in row:
                text, choices = _from_instruction(row["instruction"], f"item {number} of {path}")
                gold = int(row["answer"].removeprefix("answer")) - 1
            else:
                asked = row["question"]
                text, choices = asked["stem"], [choice["text"] for choice in asked["choices"]]
                gold = [choice["label"] for choice in asked["choices"]].index(row["answerKey"].strip())
            rows.append({"query": query.format(text), "choices": choices, "gold": gold})
        return rows

    return read


def _from_instruction(text: str, where: str) -> tuple[str, list[str]]:
    """Question and answers of `... the question: Q\\n\\nAnswer1: A Answer2: B ...\\n\\nAnswer format: ...`."""
    match = re.search(r"question: (.*?)\n+(Answer1: .*?)\n+Answer format:", text, flags=re.DOTALL)
    if match is None:
        raise DataError(f"{where} is neither in AllenAI's layout nor an instruction with Answer1, Answer2: check the file")
    return match[1].strip(), [part.strip() for part in re.split(r"\s*Answer\d+: ", match[2])[1:]]


def _race(path: Path) -> Rows:
    """A folder of RACE as first published, a passage with its questions in each file. As in the harness, a passage is one
    item: its last question is asked, with the others and their answers before it."""
    rows = []
    for file in sorted(path.glob("*.txt"), key=lambda file: (len(file.stem), file.stem)):
        (page,) = read_rows(file)
        asked = list(zip(page["questions"], page["options"], page["answers"], strict=True))
        text = f"Article: {page['article']}\n\n"
        for question, options, answer in asked[:-1]:
            said = options["ABCD".index(answer)]
            blank = question.endswith("  _  .")
            text += f"{question[:-5]}{said}\n" if blank else f"Question: {question}\nAnswer: {said}\n"
        question, options, answer = asked[-1]
        rows.append({"query": text + question, "choices": options, "gold": "ABCD".index(answer)})
    if not rows:
        raise DataError(f"{path} holds no passages (.txt files of JSON): get RACE anew")
    return rows


def _nq_open(path: Path) -> Rows:
    return [{"query": f"Q: {row['question']}?\nA:", "answers": list(row["answer"])} for row in read_rows(path)]


_QUESTION = _science("Question: {}\nAnswer:")
LOCAL = {
    "openbookqa": _Local(("openbookqa_test.json", "openbookqa/test.jsonl"), _science("{}"), _CHOICE),
    "arc_easy": _Local(("ARC-Easy-Test.jsonl", "ARC-Easy_test.json"), _QUESTION, _CHOICE),
    "arc_challenge": _Local(("ARC-Challenge-Test.jsonl", "ARC-Challenge_test.json"), _QUESTION, _CHOICE),
    "piqa": _Local(("piqa/valid.jsonl",), _piqa, _CHOICE),
    "hellaswag": _Local(("hellaswag_val.jsonl", "hellaswag_val*.jsonl"), _hellaswag, _CHOICE),
    "nq_open": _Local(("NQ-open.dev.jsonl", "NQ-open*.jsonl"), _nq_open, _SHORT_ANSWER),
    "race_middle": _Local(("RACE/test/middle", "test/middle"), _race, _CHOICE | {"metric_list": _ACCURACY[:1]}),
    "race_high": _Local(("RACE/test/high", "test/high"), _race, _CHOICE | {"metric_list": _ACCURACY[:1]}),
}
"""Benchmarks that are read from files, with the wording and the metrics of the harness's own definitions."""


def gather(given: Sequence[str | Path], only: Sequence[str] = (), online: bool = False) -> Tasks | None:
    """The tasks found in the user's folders, and with `online` the harness's own for the rest.

    A .yaml, .yml or .json file given by name that defines a task is one (task_files.py). Raises DataError where
    nothing is found or a task named in `only` is not, ConfigError where two tasks have one name. None where `only` names
    tasks of other suites alone.
    """
    places = [Path(path) for path in given]
    chosen = [name for name in NAMES if not only or name in only]
    own = _own(places, only)
    local, remote, missing = [], [], []
    for name in chosen:
        path = _find(LOCAL[name].files, places) if name in LOCAL else None
        if path is not None and name in own:
            theirs = own[name].path.partition(", ")[0]
            raise ConfigError(f"{path} is the benchmark {name}, and {theirs} defines a task of its name: rename that")
        if path is not None:
            local.append(_local(name, path))
        elif name in own:
            continue
        elif not online or HARNESS_TASKS[name] is None:
            missing.append(name)
        else:
            remote.append(name)
    local += own.values()
    if only and not chosen and not local:
        return None
    wanted = [name for name in only if name in missing]
    if wanted or not (local or remote):
        names = ", ".join(wanted or missing)
        files = "; ".join(f"{name}: {LOCAL[name].files[0]}" for name in (wanted or missing) if name in LOCAL)
        raise DataError(
            f"no local file for {names}: give --data a folder with its file in the original layout"
            f"{f' ({files})' if files else ''}, or --online to let the harness load its own data"
        )
    notes = []
    if missing:
        notes.append(f"not measured for want of local files: {', '.join(missing)} (--online lets the harness load its own)")
    return Tasks(tuple(local), tuple(remote), tuple(notes),
                 {task.name: {"path": task.path, "sha256": task.sha256} for task in local})


def _own(places: Iterable[Path], only: Sequence[str]) -> dict[str, LocalTask]:
    """The user's tasks by name. Raises ConfigError where two have one name."""
    found: dict[str, LocalTask] = {}
    files = {path.resolve(): path for path in places if path.is_file() and task_files.is_task_file(path)}
    for path in files.values():
        name = task_files.name_of(path)
        if only and name not in only:
            continue
        if name in found:
            raise ConfigError(f"{found[name].path.partition(', ')[0]} and {path} both define the task {name}: rename one")
        found[name] = task_files.load(path)
    return found


def _local(name: str, path: Path) -> LocalTask:
    try:
        rows = LOCAL[name].read(path)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} departs from {name}'s layout ({type(error).__name__}: {error}): get it anew") from None
    for number, row in enumerate(rows, start=1):
        gold, choices = row.get("gold", 0), row.get("choices", [""])
        if not 0 <= gold < len(choices):
            raise DataError(f"the answer to item {number} of {path} is number {gold} (from 0) of {len(choices)} choices: "
                            f"get {name} anew")
    return LocalTask(name, GROUPS[name], LOCAL[name].settings, rows, str(path), _hash(path))


def _hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files."""
    if path.is_file():
        return hash_file(path).sha256
    found = "".join(f"{file.name} {hash_file(file).sha256}\n" for file in sorted(path.glob("*.txt")))
    return hashlib.sha256(found.encode()).hexdigest()


def _find(patterns: Iterable[str], places: Sequence[Path]) -> Path | None:
    for pattern in patterns:
        for place in places:
            if place.is_file():
                if place.match(pattern):
                    return place
            elif found := next(iter(sorted(place.rglob(pattern))), None):
                return found
    return None


"""The in-context suite: which label of all does the model find likeliest behind each query?

A label is scored whole: the sum of the log-probabilities of all its tokens and of what ends it (`prompts.terminator`).
Without the end a label that another one begins with would always be at least as likely as the longer one; dividing by
the number of tokens instead would favour long labels whose last tokens follow from their first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from mmcore.evaluation.in_context.datasets import Classification, Example
from mmcore.evaluation.in_context.prompts import FORMS, Form, draw_shots, head, label_names, opened, terminator
from mmcore.evaluation.intervals import wilson
from mmcore.evaluation.journal import Journal, key_of
from mmcore.evaluation.reading import Reader

Tick = Callable[[float], None]


def pick_queries(task: Classification, most: int, seed: int = 0) -> list[Example]:
    """At most `most` examples to ask about, by the seed, classes as equal in number as can be."""
    by_label: dict[str, list[Example]] = {}
    for example in task.asked:
        by_label.setdefault(example.label, []).append(example)
    for label, found in by_label.items():
        random.Random(f"{seed}/{task.name}/queries/{label}").shuffle(found)
    labels = sorted(by_label)
    random.Random(f"{seed}/{task.name}/queries").shuffle(labels)
    longest = max(map(len, by_label.values()))
    turns = [by_label[label][turn] for turn in range(longest) for label in labels if turn < len(by_label[label])]
    return turns[:most]


def forms_of(shots: int) -> tuple[Form, ...]:
    """The forms that differ: without examples there is nothing to shuffle."""
    return FORMS if shots else tuple(form for form in FORMS if not form.shuffled)


def measure_form(
    task: Classification, kind: str, shots: int, form: Form, queries: list[Example], reader: Reader, journal: Journal,
    identity: Any, seed: int = 0, tick: Tick | None = None,
) -> list[bool]:
    """Whether each query was answered right in one form."""
    names = label_names(task, kind, seed)
    drawn = draw_shots(task, shots, seed)
    before = head(task, drawn, names, form, seed)
    end = terminator(task, drawn, form)
    endings = [f" {names[label]}{end}" for label in task.labels]
    head_key = key_of(before)
    if journal.get(head_key) is None:  # once for all queries and models: it may be long
        journal.put(head_key, {"suite": "in-context", "task": task.name, "labels": kind, "shots": shots, "form": form.name,
                               "head": before})
    held, right = False, []
    for number, query in enumerate(queries, start=1):
        prompt = before + opened(query, form)
        key = key_of("in-context", identity, prompt, endings, query.label)
        record = journal.get(key)
        if record is None:
            if not held:
                reader.hold(before)
                held = True
            scores = reader.choose(prompt, endings)
            best = max(range(len(scores)), key=scores.__getitem__)
            gold = task.labels.index(query.label)
            record = journal.put(key, {
                "suite": "in-context", "model": identity, "task": task.name, "labels": kind, "shots": shots,
                "form": form.name, "query": opened(query, form), "head": head_key, "end": end,
                "answer": names[query.label], "prediction": names[task.labels[best]],
                "logprob_answer": scores[gold], "logprob_prediction": scores[best], "score": float(best == gold),
            })
        right.append(bool(record["score"]))
        if tick:
            tick(number / len(queries))
    return right


def measure(
    task: Classification, kind: str, shots: Sequence[int], most: int, reader: Reader, journal: Journal, identity: Any,
    seed: int = 0, tick: Tick | None = None,
) -> list[dict[str, Any]]:
    """Accuracy in percent with each number of shots, as rows of plain values: each form, their mean, and the best form,
    with Wilson's intervals. That of the mean counts a query once, whatever the number of forms; that of the best takes no
    account of its having been chosen."""
    queries = pick_queries(task, most, seed)
    # A form's prompts with more shots begin with those with fewer, which are then read already.
    steps = [(form, count) for form in FORMS for count in sorted(shots) if form in forms_of(count)]
    right: dict[int, dict[Form, list[bool]]] = {count: {} for count in shots}
    for number, (form, count) in enumerate(steps):
        report = tick and (lambda share, number=number: tick((number + share) / len(steps)))
        right[count][form] = measure_form(task, kind, count, form, queries, reader, journal, identity, seed, report)
    return [_row(task, kind, count, right[count], reader, seed) for count in shots]


def _row(
    task: Classification, kind: str, shots: int, right: dict[Form, list[bool]], reader: Reader, seed: int
) -> dict[str, Any]:
    """Of one number of shots; `right`: whether each query was answered right, by form."""
    forms = []
    for form, answered in right.items():
        low, high = wilson(sum(answered), len(answered))
        forms.append({"form": form.name, "score": 100 * sum(answered) / len(answered), "interval": [100 * low, 100 * high]})
    items = len(next(iter(right.values())))
    mean = sum(form["score"] for form in forms) / len(forms)
    low, high = wilson(sum(map(sum, right.values())) / len(forms), items)
    return {
        "task": task.name, "labels": kind, "shots": shots, "classes": len(task.labels), "items": items,
        "chance": 100 / len(task.labels), "best": max(forms, key=lambda form: form["score"]), "mean": mean,
        "mean_interval": [100 * low, 100 * high], "forms": forms,
        "head_tokens": reader.count(head_text(task, kind, shots, seed)),
        "example": head_text(task, kind, min(1, shots), seed)[:1500],
    }


def head_text(task: Classification, kind: str, shots: int, seed: int = 0) -> str:
    """The common part of the prompts in the first form."""
    return head(task, draw_shots(task, shots, seed), label_names(task, kind, seed), FORMS[0], seed)

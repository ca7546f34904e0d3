"""The items of a user's task, each rendered and checked before the work.

The harness looks at a task's first item alone. Of a later one it would read a missing field as the word None, and count
an answer that is none of the choices as wrong.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from mmcore.config.words import whole_number
from mmcore.errors import DataError
from mmcore.evaluation.persistent.local import Rows

FAILURES = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError)
"""What rendering a template may raise."""


class _Fault(Exception):
    """What is wrong with an item, and the remedy."""


def check(settings: dict[str, Any], rows: Rows, source: Path, environment: ImmutableSandboxedEnvironment) -> None:
    """Raises DataError for the first row of `source` that the harness could not score, or would score as what it is not.

    Rows count from 1, a CSV's header among them.
    """
    reader = _Reader(settings, rows, environment)
    first: tuple[type, bool] | None = None
    for number, row in enumerate(rows, start=2 if source.suffix.lower() == ".csv" else 1):
        try:
            question, choices, answer = reader.read(row)
            # The harness takes what the first item is for what all are.
            kind = (type(question), isinstance(answer, list))
            first = first or kind
            if kind[0] is not first[0]:
                raise _Fault("its question is a bare number, or that of the first row is: the harness takes such a one for "
                             "the number of a choice; put a word into doc_to_text")
            if kind[1] is not first[1]:
                raise _Fault("its answer is a list, or that of the first row is: write all alike (doc_to_target: FIELD, "
                             "without braces, takes a field as it is)")
            _check_item(settings["output_type"], question, choices, answer)
        except SecurityError as error:
            raise DataError(
                f"row {number} of {source}: a template holds code ({error}): a task file may hold data only"
            ) from None
        except _Fault as fault:
            raise DataError(f"row {number} of {source}: {fault}") from None


def check_shots(shots: Any, rows: Rows, path: Path, source: Path) -> None:
    """Raises DataError unless `shots` examples can be shown with any item, itself and rows like it left out."""
    if shots is None:
        return
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 0:
        raise DataError(f"{path}: num_fewshot is {shots!r}: it must be a whole number, 0 or more")
    most = len(rows) - max(Counter(json.dumps(row, sort_keys=True, default=str) for row in rows).values())
    if shots > most:
        raise DataError(
            f"{path}: num_fewshot is {shots}, and {source} has {most} other rows for an item: lower it, or add rows"
        )


class _Reader:
    """Items as the harness will read them: of a key that names a field the field as it is, of others the rendered text."""

    def __init__(self, settings: dict[str, Any], rows: Rows, environment: ImmutableSandboxedEnvironment) -> None:
        self._settings = settings
        self._fields = {name for row in rows for name in row}
        self._templates = {key: environment.from_string(settings[key]) for key in
                           ("doc_to_text", "doc_to_target", "doc_to_choice", "description")
                           if isinstance(settings.get(key), str) and settings[key] not in self._fields}

    def read(self, row: dict[str, Any]) -> tuple[Any, list[Any] | None, Any]:
        """Question, choices (None where there are none to choose from), answer."""
        self._value("description", row)
        choices = self._choices(row)
        question = self._value("doc_to_text", row)
        if "doc_to_text" in self._templates and choices is not None and (number := whole_number(question)) is not None:
            question = number
        return question, choices, self._answer(row, choices)

    def _value(self, key: str, row: dict[str, Any]) -> Any:
        if key in self._templates:
            try:
                return self._templates[key].render(**row)
            except SecurityError:
                raise
            except FAILURES as error:
                raise _Fault(f"the template {key} fails ({error}): complete or correct the row, or let the template ask "
                             f"whether a field `is defined`") from None
        value = self._settings.get(key)
        if not isinstance(value, str):
            return value
        if row.get(value) is None:
            raise _Fault(f"it lacks {value!r}, which is its {key}: complete or remove it")
        return row[value]

    def _choices(self, row: dict[str, Any]) -> list[Any] | None:
        value = self._value("doc_to_choice", row)
        if isinstance(value, dict):
            return list(value.values())
        if "doc_to_choice" in self._templates:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise _Fault(f"doc_to_choice gives {value[:60]!r}, which is no list of texts: correct it") from None
        if value is not None and not isinstance(value, list):
            raise _Fault(f"doc_to_choice gives {value!r}, which is no list of texts: correct it")
        return value

    def _answer(self, row: dict[str, Any], choices: list[Any] | None) -> Any:
        value = self._value("doc_to_target", row)
        if "doc_to_target" not in self._templates:
            return value
        if choices is not None and (number := whole_number(value)) is not None:
            return number
        if len(value) >= 2 and value[0] == "[" and value[-1] == "]":
            try:
                return ast.literal_eval(value)
            except (ValueError, SyntaxError):
                return value
        return value


def _check_item(output: str, question: Any, choices: list[Any] | None, answer: Any) -> None:
    if output == "multiple_choice":
        _check_choices(choices)
        if isinstance(question, int):  # each choice makes a question of its own, and the answer stands behind it
            _check_number(question, choices, "the number of its choice")
            _check_text(answer, "its answer")
        else:
            _check_text(question, "its question", empty=True)
            for one in _alternatives(answer):
                _check_number(one, choices, "its answer", named=not isinstance(answer, list))
        return
    _check_text(question, "its question", empty=True)
    if output != "generate_until":
        _check_text(answer, "its answer")
    elif choices is not None:
        _check_choices(choices)
        _check_number(answer, choices, "its answer")
    elif isinstance(answer, list):
        for one in _alternatives(answer):
            _check_text(one, "one of its answers", empty=any(answer))
    elif not isinstance(answer, (int, float)):
        _check_text(answer, "its answer")


def _alternatives(answer: Any) -> Iterator[Any]:
    if answer == []:
        raise _Fault("it has no answer: complete or remove it")
    yield from answer if isinstance(answer, list) else [answer]


def _check_choices(choices: Any) -> None:
    if not choices:
        raise _Fault("it has no choices: complete or remove it")
    for choice in choices:
        _check_text(choice, "one of its choices")


def _check_number(value: Any, choices: list[str], what: str, named: bool = False) -> None:
    """`named`: a choice's text will do as well."""
    if isinstance(value, int) and 0 <= value < len(choices) or named and isinstance(value, str) and value in choices:
        return
    remedy = f"give a whole number from 0 to {len(choices) - 1}{', or the text of one' if named else ''}"
    raise _Fault(f"{what} is {value!r}, which is none of its {len(choices)} choices: {remedy}")


def _check_text(value: Any, what: str, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise _Fault(f"{what} is {value!r}, which is no text: write it as one")
    if not value and not empty:
        raise _Fault(f"{what} is empty: complete or remove the row")

"""n-shot prompts in four forms: newline or space between their parts, examples shuffled within a shot or not."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mmcore.errors import ConfigError
from mmcore.evaluation.in_context.datasets import Classification, Example

KINDS = ("semantic", "anonymous")


@dataclass(frozen=True)
class Form:
    """How a prompt's parts are joined and ordered."""

    delimiter: str
    shuffled: bool

    @property
    def name(self) -> str:
        return f"{'newline' if self.delimiter == chr(10) else 'space'}, {'shuffled' if self.shuffled else 'in order'}"


FORMS = tuple(Form(delimiter, shuffled) for delimiter in ("\n", " ") for shuffled in (False, True))


def label_names(task: Classification, kind: str, seed: int = 0) -> dict[str, str]:
    """What each label is called: itself, or class_00, class_01 ... given out at random by the seed."""
    if kind == "semantic":
        return {label: label for label in task.labels}
    width = max(2, len(str(len(task.labels) - 1)))
    numbers = list(range(len(task.labels)))
    random.Random(f"{seed}/{task.name}/anonymous").shuffle(numbers)
    return {label: f"class_{number:0{width}}" for label, number in zip(task.labels, numbers, strict=True)}


def draw_shots(task: Classification, shots: int, seed: int = 0) -> list[list[Example]]:
    """`shots` lists of one example of every class, in the order of the labels. Fewer shots are the first of more, so
    that a curve over shots adds examples and changes none. Raises ConfigError where a class has too few."""
    by_label: dict[str, list[Example]] = {label: [] for label in task.labels}
    for example in task.shown:
        by_label[example.label].append(example)
    scarce = min(by_label, key=lambda label: len(by_label[label]))
    if len(by_label[scarce]) < shots:
        raise ConfigError(
            f"{task.name} has {len(by_label[scarce])} examples of {scarce!r} to show: ask for at most so many --shots"
        )
    for label, found in by_label.items():
        random.Random(f"{seed}/{task.name}/{label}").shuffle(found)
    return [[by_label[label][shot] for label in task.labels] for shot in range(shots)]


def opened(example: Example, form: Form) -> str:
    """An example without its label."""
    return form.delimiter.join(example.pieces)


def head(task: Classification, shots: list[list[Example]], names: dict[str, str], form: Form, seed: int = 0) -> str:
    """What all queries of a form have before them: the instruction and the examples with their labels."""
    parts = [task.instruction]
    for number, shot in enumerate(shots):
        shot = list(shot)
        if form.shuffled:
            random.Random(f"{seed}/{task.name}/order/{number}").shuffle(shot)
        parts += [f"{opened(example, form)} {names[example.label]}" for example in shot]
    return form.delimiter.join(parts) + form.delimiter


def terminator(task: Classification, shots: list[list[Example]], form: Form) -> str:
    """What shows that a label is over: the line's end, or, with spaces between the examples, a space and the first word
    of the first example (a space alone is no token of its own)."""
    if form.delimiter == "\n":
        return "\n"
    first = shots[0][0] if shots else task.asked[0]
    return " " + first.pieces[0].split()[0]

"""Texts with one label each: Banking77, GoEmotions, Tacred (or FewRel in its form), TREC, or any CSV of text and label."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mmcore.config.words import whole_number
from mmcore.errors import DataError
from mmcore.evaluation.lines import lines_of

TEXT_COLUMNS = ("text", "sentence", "query", "utterance", "comment", "review")
LABEL_COLUMNS = ("label", "category", "intent", "class", "relation", "emotion")
RELATION_INSTRUCTION = "Name the relation between the two entities of each sentence."
TREC_LABELS = {"ABBR": "abbreviation", "DESC": "description", "ENTY": "entity", "HUM": "human", "LOC": "location",
               "NUM": "number"}
TEST_SHARE = 0.25
"""Of a class's examples, where a file is not divided into examples to learn from and to be asked about."""


@dataclass(frozen=True)
class Example:
    """A prompt's open end, in pieces that the prompt form joins, and the label that closes it."""

    pieces: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Classification:
    """A task of classification."""

    name: str
    instruction: str
    labels: tuple[str, ...]
    shown: tuple[Example, ...]
    """To take shots from."""
    asked: tuple[Example, ...]
    sha256: str
    """Of the files."""
    paths: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What was left out of the files."""


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path") from None


def _digest(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def banking77(folder: Path) -> Classification:
    """train.csv and test.csv with the columns text and category."""
    parts, contents = [], []
    for name in ("train.csv", "test.csv"):
        contents.append(_bytes(folder / name))
        rows = read_csv(contents[-1], folder / name)
        parts.append([Example((f"service query: {text}", "intent category:"), label) for text, label in rows])
    return build(
        "banking77", "Classify each service query into its intent category.", parts[0], parts[1], contents,
        [folder / "train.csv", folder / "test.csv"],
    )


def goemotions(folder: Path) -> Classification:
    """train.tsv and test.tsv (text, comma-separated label numbers, id) and labels.txt; comments with one label only."""
    names = _text(_bytes(folder / "labels.txt"), folder / "labels.txt").split()
    parts, contents = [], [_bytes(folder / "labels.txt")]
    for name in ("train.tsv", "test.tsv"):
        contents.append(_bytes(folder / name))
        part = []
        for number, line in enumerate(lines_of(_text(contents[-1], folder / name)), start=1):
            text, _, rest = line.partition("\t")
            marks = [whole_number(mark) for mark in rest.split("\t")[0].split(",")]
            if not all(mark is not None and mark < len(names) for mark in marks):
                raise DataError(f"line {number} of {folder / name} has no label numbers below {len(names)}: check the file")
            if len(marks) == 1:
                part.append(Example((f"comment: {_flat(text)}", "emotion category:"), names[marks[0]]))
        parts.append(part)
    paths = [folder / name for name in ("labels.txt", "train.tsv", "test.tsv")]
    return build("goemotions", "Classify each comment into its emotion category.", *parts, contents, paths)


def fewrel(path: Path, seed: int = 0) -> Classification:
    """FewRel's JSON {relation: [{tokens, h, t}]}, with pid2name.json beside it where relations are numbers.

    Prompts have Tacred's form: a sentence, then `the relation between A and B is:`.
    """
    content = _bytes(path)
    names_file = path.with_name("pid2name.json")
    contents = [content] + ([_bytes(names_file)] if names_file.is_file() else [])
    try:
        relations = json.loads(content)
        names = {pid: name for pid, (name, _) in json.loads(contents[1]).items()} if len(contents) > 1 else {}
        examples = [
            _related(one["tokens"], _entity(one, "h"), _entity(one, "t"), names.get(relation, relation))
            for relation, found in relations.items() for one in found
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path} departs from FewRel's layout ({type(error).__name__}: {error}): check the file") from None
    paths = [path] + ([names_file] if names_file.is_file() else [])
    return build("relations", RELATION_INSTRUCTION, *divide(examples, seed), contents, paths)


def tacred(folder: Path) -> Classification:
    """train.json and test.json, anywhere in the folder, in the layout of the Linguistic Data Consortium's release:
    [{token, subj_start, subj_end, obj_start, obj_end, relation}], ends included; no_relation is left out, as in the
    paper: 41 classes."""
    parts, contents, paths = [], [], []
    for name in ("train.json", "test.json"):
        path = next(iter(sorted(folder.rglob(name))), folder / name)
        paths.append(path)
        contents.append(_bytes(path))
        try:
            rows = [row for row in json.loads(contents[-1]) if row["relation"] != "no_relation"]
            parts.append([_related(row["token"], _span(row, "subj"), _span(row, "obj"), row["relation"]) for row in rows])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fault = f"{type(error).__name__}: {error}"
            raise DataError(f"{path} departs from Tacred's layout ({fault}): check the file") from None
    return build("relations", RELATION_INSTRUCTION, *parts, contents, paths)


def _span(row: dict, side: str) -> list[str]:
    return row["token"][row[f"{side}_start"] : row[f"{side}_end"] + 1]


def _related(tokens: list[str], one: list[str], other: list[str], label: str) -> Example:
    """A sentence and the question of Tacred's prompt form."""
    return Example((_flat(" ".join(tokens)),
                    f"the relation between {_flat(' '.join(one))} and {_flat(' '.join(other))} is:"), label)


def trec(folder: Path) -> Classification:
    """train.txt and test.txt (or under their first names) with lines `COARSE:fine question`; the six coarse classes."""
    parts, contents, paths = [], [], []
    for names in (("train.txt", "train_5500.label"), ("test.txt", "TREC_10.label")):
        path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
        paths.append(path)
        contents.append(_bytes(path))
        part = []
        try:
            text = contents[-1].decode("utf-8-sig")
        except UnicodeDecodeError:
            text = contents[-1].decode("latin-1")  # as first published
        for number, line in enumerate(lines_of(text), start=1):
            kind, _, question = line.partition(" ")
            label = TREC_LABELS.get(kind.partition(":")[0])
            if label is None or not question.strip():
                raise DataError(f"line {number} of {path} is no question behind its class, as 'NUM:date When ...' is")
            part.append(Example((f"question: {_flat(question)}", "asks for:"), label))
        parts.append(part)
    return build("trec", "Say what kind of thing each question asks for.", *parts, contents, paths)


def from_csv(path: Path, seed: int = 0) -> Classification:
    """Any CSV of text and label: `path`, or the files train.csv and test.csv of a folder."""
    files = [path / "train.csv", path / "test.csv"] if path.is_dir() else [path]
    contents = [_bytes(file) for file in files]
    parts = [[Example((f"text: {text}", "label:"), label) for text, label in read_csv(content, file)]
             for content, file in zip(contents, files, strict=True)]
    notes: tuple[str, ...] = ()
    if len(parts) == 1:
        found, notes = distinct(parts[0])
        if notes and len({one.label for one in found}) < 2 <= len({one.label for one in parts[0]}):
            raise DataError(f"{path} has too few texts with one label ({notes[-1]}): give each text one label")
        parts = divide(found, seed)
    return replace(build(path.stem, "Give each text its label.", *parts, contents, files), notes=notes)


def distinct(examples: list[Example]) -> tuple[list[Example], tuple[str, ...]]:
    """The examples, each once and without texts that have several labels, in their order; and notes of what that left out.

    Otherwise a text could be asked about that stands among the shots, with its label or with another.
    """
    labels: dict[tuple[str, ...], set[str]] = {}
    for example in examples:
        labels.setdefault(example.pieces, set()).add(alike(example.label))  # spellings of one label are refused later
    once = list(dict.fromkeys(examples))
    clear = [example for example in once if len(labels[example.pieces]) == 1]
    notes = []
    if len(once) < len(examples):
        notes.append(f"rows that say what an earlier one says were left out: {len(examples) - len(once):,}")
    unclear = [pieces for pieces, found in labels.items() if len(found) > 1]
    if unclear:
        first = unclear[0][0].removeprefix("text: ")[:60]
        notes.append(f"texts that have several labels were left out: {len(unclear):,}, such as {first!r}")
    return clear, tuple(notes)


def read_csv(content: bytes, path: Path) -> list[tuple[str, str]]:
    """(text, label) of every row of a CSV with a header. Raises DataError where it is not clear which columns."""
    reader = csv.reader(io.StringIO(_text(content, path), newline=""))
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV at line {reader.line_num} ({error}): correct or remove it") from None
    if len(rows) < 2:
        raise DataError(f"{path} holds no rows: give a CSV with a header and the columns text and label")
    header = [name.strip().lower() for name in rows[0]]
    columns = [next((header.index(name) for name in known if name in header), None)
               for known in (TEXT_COLUMNS, LABEL_COLUMNS)]
    if None in columns:
        raise DataError(f"{path} has the columns {', '.join(rows[0])}: name them text and label in its first line")
    text, label = columns
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header) or not row[text].strip() or not row[label].strip():
            raise DataError(f"row {number} of {path} lacks a text or a label: complete or remove it")
    return [(_flat(row[text]), row[label].strip()) for row in rows[1:]]


def divide(examples: list[Example], seed: int) -> list[list[Example]]:
    """Examples to show and to ask about, every class divided alike, by the seed alone."""
    shown: list[Example] = []
    asked: list[Example] = []
    for label in sorted({example.label for example in examples}):
        mine = [example for example in examples if example.label == label]
        random.Random(f"{seed}/{label}").shuffle(mine)
        cut = max(1, round(len(mine) * TEST_SHARE))
        asked += mine[:cut]
        shown += mine[cut:]
    return [shown, asked]


def build(
    name: str, instruction: str, shown: list[Example], asked: list[Example], contents: list[bytes], paths: list[Path]
) -> Classification:
    """Check and assemble. Raises DataError for labels that a reader could not tell apart."""
    labels = tuple(sorted({example.label for example in shown}))
    where = " and ".join(map(str, paths))
    if len(labels) < 2:
        raise DataError(f"{where} has {len(labels)} label with examples to show: a classification needs two")
    unseen = sorted({example.label for example in asked} - set(labels))
    if unseen:
        raise DataError(f"{where} asks about the label {unseen[0]!r}, of which it shows no example: add some")
    for one in labels:
        twins = [other for other in labels if other != one and alike(other) == alike(one)]
        if twins:
            raise DataError(
                f"{where} has the labels {one!r} and {twins[0]!r}, which are one label to a reader: spell them alike"
            )
    if not asked:
        raise DataError(f"{where} has nothing to ask about: add examples")
    return Classification(name, instruction, labels, tuple(shown), tuple(asked), _digest(contents), tuple(map(str, paths)))


def alike(label: str) -> str:
    """What is left of a label when capitals and white space do not count."""
    return " ".join(label.lower().split())


def prefixes(labels: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of labels the first of which the second begins with."""
    ordered = sorted(labels)
    found = []
    for place, one in enumerate(ordered):
        for other in ordered[place + 1:]:
            if not other.startswith(one):
                break
            found.append((one, other))
    return found


def _entity(one: dict, side: str) -> list[str]:
    """An entity as the sentence spells it (the first place where it stands)."""
    return [one["tokens"][place] for place in one[side][2][0]]


def _flat(text: str) -> str:
    """A text on one line: a line break ends an example."""
    return " ".join(text.split())


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): convert it") from None

"""The data of the suites, found in the folders and files that the user names."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmcore.errors import ConfigError, DataError
from mmcore.evaluation import ruler
from mmcore.evaluation.in_context import datasets
from mmcore.evaluation.in_context.datasets import Classification
from mmcore.evaluation.ruler import niah
from mmcore.evaluation.ruler.documents import kind_of, read_pool
from mmcore.evaluation.ruler.suite import Sources

SUITES = ("persistent", "new-knowledge", "in-context")
CLASSIFICATIONS = ("banking77", "goemotions", "relations")
"""The paper's."""
MORE_CLASSIFICATIONS = ("trec",)
"""Measured where --tasks names them."""
MOST_ESSAY_WORDS = 400_000
"""Words of running text that are kept: more than the longest haystack has."""

_DEPTH = 5


@dataclass(frozen=True)
class Wanted:
    """Where a task's data are, and where to get them."""

    patterns: tuple[str, ...]
    """Names of files or folders, best first."""
    what: str
    """For the user: which file, and where it is to be had."""


WANTED = {
    "qa_1": Wanted(
        ("dev-v2.0.json", "dev-v1.1.json", "xquad.en.json", "*squad*.json"),
        "dev-v2.0.json of SQuAD (https://rajpurkar.github.io/SQuAD-explorer) or xquad.en.json "
        "(https://github.com/google-deepmind/xquad)",
    ),
    "qa_2": Wanted(
        ("hotpot_dev_distractor_v1.json", "hotpot*.json"),
        "hotpot_dev_distractor_v1.json of HotpotQA (https://hotpotqa.github.io)",
    ),
    "essay": Wanted(
        ("essays", "PaulGrahamEssays*", "books*"),
        "a folder books or essays of plain text files (any long running text, such as books of "
        "https://www.gutenberg.org)",
    ),
    "banking77": Wanted(
        ("banking77", "banking_data"),
        "a folder banking77 with train.csv and test.csv (https://github.com/PolyAI-LDN/task-specific-datasets)",
    ),
    "goemotions": Wanted(
        ("goemotions",),
        "a folder goemotions with train.tsv, test.tsv and labels.txt "
        "(https://github.com/google-research/google-research/tree/master/goemotions)",
    ),
    "relations": Wanted(
        ("tacred", "val_wiki.json", "train_wiki.json"),
        "a folder tacred with train.json and test.json (https://catalog.ldc.upenn.edu/LDC2018T24), or val_wiki.json and "
        "pid2name.json of FewRel (https://github.com/thunlp/FewRel)",
    ),
    "trec": Wanted(
        ("trec",), "a folder trec with train.txt and test.txt (https://cogcomp.seas.upenn.edu/Data/QA/QC)",
    ),
}


@dataclass(frozen=True)
class Material:
    """All that the chosen tasks need."""

    new_knowledge: tuple[str, ...] = ()
    """Tasks."""
    sources: Sources = field(default_factory=lambda: Sources({}))
    classifications: tuple[Classification, ...] = ()
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    """Task or text -> path and sha256, for the report."""


def gather(suites: Sequence[str], given: Sequence[str | Path], only: Sequence[str] = (), seed: int = 0) -> Material:
    """Find and read the data of the native suites. `only`: these tasks and no others.

    A file given by its own name counts whatever it is called: SQuAD or HotpotQA JSON by its layout, a CSV of text and
    label as a classification of its own. Raises DataError that names everything missing at once, ConfigError for a
    task that is not known and for two CSVs with one name.
    """
    places = [Path(path) for path in given]
    for path in places:
        if not path.exists():
            raise DataError(f"there is no file or folder {path}: check --data")
    own = _own(places)
    _check_names(only, own, places)
    missing: list[str] = []
    hashes: dict[str, dict[str, str]] = {}

    def find(name: str) -> Path | None:
        found = _find(name, places)
        if found is None:
            missing.append(f"{name} needs {WANTED[name].what}")
        return found

    tasks, sources = _new_knowledge(find, only, hashes) if "new-knowledge" in suites else ((), Sources({}))
    found = _classifications(find, own, only, hashes, seed) if "in-context" in suites else ()
    if missing:
        where = f"in {', '.join(map(str, places))}" if places else "without --data DIR"
        raise DataError(f"not found {where}: {'; '.join(missing)}; put it there, or leave the task out with --tasks")
    return Material(tasks, sources, found, hashes)


def known_tasks() -> tuple[str, ...]:
    """Native tasks by name."""
    return ruler.TASKS + CLASSIFICATIONS + MORE_CLASSIFICATIONS


def _own(places: Iterable[Path]) -> dict[str, Path]:
    """The user's CSVs by the names of their tasks. Raises ConfigError where two have one name."""
    found: dict[str, Path] = {}
    for path in places:
        if path.suffix.lower() != ".csv":
            continue
        other = found.setdefault(path.stem, path)
        if other.resolve() != path.resolve():
            raise ConfigError(f"{other} and {path} would both be called {path.stem}: give one of them another name")
    return found


def _check_names(only: Sequence[str], own: Iterable[str], places: Iterable[Path]) -> None:
    from mmcore.evaluation.persistent import benchmarks, task_files

    known = {*known_tasks(), *own, *benchmarks.NAMES}
    if not known.issuperset(only):
        known |= {task_files.name_of(path) for path in places if path.is_file() and task_files.is_task_file(path)}
    for name in only:
        if name not in known:
            raise ConfigError(f"there is no task {name!r}: choose from {', '.join(sorted(known))}")


def _new_knowledge(
    find: Callable[[str], Path | None], only: Sequence[str], hashes: dict[str, dict[str, str]]
) -> tuple[tuple[str, ...], Sources]:
    tasks = tuple(task for task in ruler.TASKS if not only or task in only)
    pools = {}
    for task in ruler.QA_TASKS:
        if task in tasks and (path := find(task)):
            pools[task] = read_pool(path)
            hashes[task] = {"path": str(path), "sha256": pools[task].sha256}
    words = None
    if any(task in niah.TASKS and niah.TASKS[task].haystack == "essay" for task in tasks) and (path := find("essay")):
        words, digest = read_words(path)
        hashes["essay"] = {"path": str(path), "sha256": digest}
    return tasks, Sources(pools, words)


def _classifications(
    find: Callable[[str], Path | None], own: dict[str, Path], only: Sequence[str], hashes: dict[str, dict[str, str]],
    seed: int,
) -> tuple[Classification, ...]:
    # A user's own CSV stands alone unless other tasks are asked for by name.
    if only:
        names = [name for name in dict.fromkeys((*CLASSIFICATIONS, *MORE_CLASSIFICATIONS, *own)) if name in only]
    else:
        names = list(own or CLASSIFICATIONS)
    readers = {"banking77": datasets.banking77, "goemotions": datasets.goemotions, "trec": datasets.trec,
               "relations": lambda path: datasets.tacred(path) if path.is_dir() else datasets.fewrel(path, seed)}
    found = []
    for name in names:
        path = own.get(name) or find(name)
        if path is None:
            continue
        task = datasets.from_csv(path, seed) if name in own else readers[name](path)
        found.append(task)
        hashes[task.name] = {"path": ", ".join(task.paths), "sha256": task.sha256}
    return tuple(found)


def _find(name: str, places: Iterable[Path]) -> Path | None:
    wanted = WANTED[name]
    for place in places:
        if place.is_file():
            if any(fnmatch.fnmatch(place.name, pattern) for pattern in wanted.patterns) or _is_pool(name, place):
                return place
            continue
        listed = sorted(_walk(place), key=lambda path: (len(path.parts), str(path)))
        for pattern in wanted.patterns:
            for path in (place, *listed):
                if fnmatch.fnmatch(path.name, pattern):
                    return path
    return None


def _is_pool(name: str, path: Path) -> bool:
    """Whether a JSON file, whatever its name, has the layout that qa_1 or qa_2 needs."""
    layout = {"qa_1": "squad", "qa_2": "hotpotqa"}.get(name)
    if layout is None or path.suffix != ".json":
        return False
    try:
        return kind_of(json.loads(path.read_bytes())) == layout
    except ValueError:
        return False


def _walk(folder: Path) -> Iterable[Path]:
    for root, folders, files in os.walk(folder):
        here = Path(root)
        if len(here.relative_to(folder).parts) >= _DEPTH:
            folders.clear()
        for name in (*folders, *files):
            yield here / name


def read_words(path: Path) -> tuple[list[str], str]:
    """The words of a text file, or of a folder's text files in the order of their names; and a hash of them."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in found if file.is_file() and (file == path or file.suffix in (".txt", ".md", ""))]
    words: list[str] = []
    for file in files:
        try:
            words += file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read as text ({error}): remove it from {path}") from None
        if len(words) >= MOST_ESSAY_WORDS:
            break
    words = words[:MOST_ESSAY_WORDS]
    if len(words) < 1000:
        raise DataError(f"{path} holds {len(words)} words: give a folder with some thousands of words of running text")
    return words, hashlib.sha256(" ".join(words).encode()).hexdigest()

"""`mm eval --suite`: checkpoints side by side on the paper's three measurements, resumable item by item."""

from __future__ import annotations

import dataclasses
import gc
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmcore
from mmcore.checkpoint.disk import hash_file
from mmcore.checkpoint.formats import Checkpoint, open_checkpoint
from mmcore.checkpoint.load import model_from, weight_format
from mmcore.errors import ConfigError, DataError
from mmcore.evaluation import folders, suite_data
from mmcore.evaluation.in_context import suite as in_context
from mmcore.evaluation.in_context.datasets import prefixes
from mmcore.evaluation.in_context.prompts import KINDS, draw_shots
from mmcore.evaluation.journal import Journal, key_of
from mmcore.evaluation.persistent.local import OWN
from mmcore.evaluation.reading import ModelReader, Reader
from mmcore.evaluation.ruler import suite as new_knowledge
from mmcore.evaluation.runner import pick_device
from mmcore.model import accounting, build_model

FULL_ITEMS = 500
"""Items of each task and length, or of each task and number of shots, where no limit is given; RULER's number."""
MULTIPLES = (1, 2, 4, 8)
"""Default lengths of new knowledge, in trained contexts."""
SHORTEST, LONGEST = 1024, 131_072
WHOLE = "whole"

Progress = Callable[[str, float, float], None]
"""Called as progress(what is measured, work done, work in all)."""
Tick = Callable[[float], None]


@dataclass(frozen=True)
class SuiteSettings:
    """What to measure, and how."""

    suites: tuple[str, ...] = suite_data.SUITES
    """Of persistent, new-knowledge and in-context."""
    without: tuple[str, ...] = ()
    """Memories to remove: every checkpoint that has them is measured whole and without them."""
    limit: int | None = None
    """Items of each task and setting; None: 500, or as many as there are."""
    tasks: tuple[str, ...] = ()
    """Only these; none: all of the suites."""
    lengths: tuple[int, ...] = ()
    """Tokens of new-knowledge prompts, answers included; none: 1, 2, 4 and 8 trained contexts, at least 1,024."""
    shots: tuple[int, ...] = (1, 2, 4, 8)
    """Examples of every class."""
    seed: int = 0
    """Of every draw: questions, documents, shots, queries."""
    ruler_exact: bool = False
    """Build qa prompts exactly as published."""
    online: bool = False
    """Whether the harness may load its own data sets from the network."""
    device: str = "auto"
    dtype: str | None = None
    """Format of the weights, as `mm chat --dtype`; None: fp32 on a CPU, bf16 on a GPU."""
    tokenizer: str | None = None
    """A tokenizer's file or folder for checkpoints that have none; None: each one's own."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            weight_format(self.dtype)
        for suite in self.suites:
            if suite not in suite_data.SUITES:
                raise ConfigError(f"there is no suite {suite!r}: choose from {', '.join(suite_data.SUITES)}, all")
        for name, values, least in (("--limit", [1 if self.limit is None else self.limit], 1), ("--shots", self.shots, 0)):
            if not values or min(values) < least:
                raise ConfigError(f"{name} is {min(values, default='empty')}: it must be at least {least}")
        for length in self.lengths:
            if not 256 <= length <= 1 << 20:
                raise ConfigError(f"--lengths has {length:,}: choose from 256 to 1,048,576 tokens, such as 1k,4k,128k")
        if len(set(self.without)) != len(self.without):
            raise ConfigError("--without names a memory twice: name each once")


@dataclass(frozen=True)
class Job:
    """One row of results: what it is called, about how many tokens it reads, and how to get it."""

    suite: str
    name: str
    cost: float
    run: Callable[[Tick], list[dict[str, Any]]]


@dataclass
class Subject:
    """A checkpoint, opened."""

    given: str
    checkpoint: Checkpoint
    sha256: str


def run_suites(
    checkpoints: Sequence[str | Path], data: Sequence[str | Path], settings: SuiteSettings, folder: str | Path,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every checkpoint and return plain values: `settings`, `data`, `versions`, `results` (one for each
    checkpoint and variant) and `notes`. Items are kept in `folder`/items.jsonl as they come; what is there already
    is not measured again (`items_found` counts what of it is used). Raises MMError.
    """
    device = pick_device(settings.device)
    dtype = settings.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    suites = [suite for suite in suite_data.SUITES if suite in settings.suites]
    material = suite_data.gather(suites, data, settings.tasks, settings.seed)
    persistent = _persistent_tasks(settings, data) if "persistent" in suites else None
    if not (material.new_knowledge or material.classifications or persistent):
        raise ConfigError(f"none of the tasks {', '.join(settings.tasks)} belongs to {', '.join(suites)}: choose others")
    sources = _sources(material, persistent)
    subjects = [open_subject(path) for path in checkpoints]
    lengths = settings.lengths or default_lengths([one.checkpoint.config.max_position_embeddings for one in subjects])
    shown = settings.shots if material.classifications else ()
    for task in material.classifications:  # too many shots are refused before hours of work
        draw_shots(task, max(shown), settings.seed)
    variants = [(subject, without) for subject in subjects for without in _variants(subject, settings.without)]
    notes = _notes(subjects, settings, lengths, material) + list(persistent.notes if persistent else ())
    results: list[dict[str, Any]] = []
    passed_over: dict[str, list[str]] = {}
    begun = time.perf_counter()
    with Journal(folder) as journal:
        for number, (subject, without) in enumerate(variants):
            model = model_from(subject.checkpoint, dtype=weight_format(dtype), device=device, without=without)
            tokenizer = mmcore.load_tokenizer(subject.given, settings.tokenizer)
            tokenizer.check_fits(model.config.vocab_size)
            identity = {"checkpoint": subject.sha256, "without": list(without), "dtype": dtype,
                        "tokenizer": tokenizer.fingerprint}
            reader = ModelReader(model, tokenizer)
            jobs = make_jobs(material, lengths, shown, settings, reader, journal, identity)
            if persistent:
                jobs.append(_persistent_job(persistent, model, tokenizer, journal, identity, settings,
                                            passed_over.setdefault(subject.given, [])))
            rows = run_jobs(jobs, f"{Path(subject.given).name}{_suffix(without)}", (number, len(variants)), progress)
            results.append(describe(subject, without, tokenizer) | rows)
            del model, reader, jobs
            gc.collect()
        if len({result["tokenizer"] for result in results}) > 1:
            notes.append(
                "the checkpoints have different tokenizers: a length in tokens holds different amounts of text for each, "
                "and their prompts of new knowledge differ; compare them with care"
            )
        notes += _shortened(results) + _passed_over(passed_over, results)
        resumed = journal.used
    return {
        "suites": suites,
        "settings": dataclasses.asdict(settings) | {"lengths": list(lengths), "device": device.type, "dtype": dtype},
        "data": sources, "versions": versions(),
        "given": {"checkpoints": [one.given for one in subjects], "data": [str(path) for path in data]},
        "results": results, "notes": notes, "items_found": resumed, "seconds": round(time.perf_counter() - begun, 1),
        "finished": time.strftime("%Y-%m-%d %H:%M %Z"),
    }


def make_jobs(
    material: suite_data.Material, lengths: Sequence[int], shots: Sequence[int], settings: SuiteSettings, reader: Reader,
    journal: Journal, identity: Any,
) -> list[Job]:
    """The native suites' rows, in the order in which they are measured."""
    most = settings.limit or FULL_ITEMS
    jobs = []
    for task in material.new_knowledge:
        for length in lengths:
            def ruler(tick: Tick, task: str = task, length: int = length) -> list[dict[str, Any]]:
                return [new_knowledge.measure(
                    task, length, most, material.sources, reader, journal, identity, seed=settings.seed,
                    published=settings.ruler_exact, tick=tick,
                )]

            jobs.append(Job("new-knowledge", f"{task} at {length:,}", float(most * length), ruler))
    for task in material.classifications:
        for kind in KINDS:
            def classify(tick: Tick, task=task, kind: str = kind) -> list[dict[str, Any]]:
                return in_context.measure(task, kind, shots, most, reader, journal, identity, settings.seed, tick)

            queries = len(shots) * min(most, len(task.asked))
            cost = 4.0 * (40 * max(shots) * len(task.labels) + queries * (40 + 6 * len(task.labels)))
            jobs.append(Job("in-context", f"{task.name}, {kind} labels", cost, classify))
    return jobs


def run_jobs(
    jobs: Sequence[Job], who: str, turn: tuple[int, int], progress: Progress | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Rows by suite. `turn`: which of how many models this is, for the work that is left."""
    rows: dict[str, list[dict[str, Any]]] = {suite: [] for suite in suite_data.SUITES}
    each = sum(job.cost for job in jobs)
    done = turn[0] * each
    for job in jobs:
        def tick(share: float, job: Job = job, done: float = done) -> None:
            if progress:
                progress(f"{who}: {job.name}", done + min(1.0, share) * job.cost, turn[1] * each)

        tick(0.0)
        rows[job.suite] += job.run(tick)
        done += job.cost
    return {suite.replace("-", "_"): found for suite, found in rows.items() if found}


def default_lengths(trained: Sequence[int]) -> tuple[int, ...]:
    """1, 2, 4 and 8 times the shortest trained context, from 1,024 to 131,072."""
    return tuple(sorted({min(LONGEST, max(SHORTEST, times * min(trained))) for times in MULTIPLES}))


def open_subject(path: str | Path) -> Subject:
    """A checkpoint with a hash of its weights and settings."""
    checkpoint = open_checkpoint(path)
    hashes = [hash_file(Path(file)).sha256 for file in checkpoint.weight_files]
    return Subject(str(path), checkpoint, key_of(hashes, dataclasses.asdict(checkpoint.config)))


def default_folder(checkpoints: Sequence[str | Path], settings: SuiteSettings, data: Sequence[str | Path]) -> Path:
    """`eval-suite-<hash of what is asked>` in the first checkpoint's run or folder, so that the same command finds
    what an interrupted one left."""
    asked = key_of([str(Path(path).absolute()) for path in checkpoints], dataclasses.asdict(settings),
                   [str(Path(path).absolute()) for path in data])
    return folders.default_folder(checkpoints[0]).parent / f"eval-suite-{asked[:12]}"


def describe(subject: Subject, without: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    """Which model a result is of."""
    config = subject.checkpoint.config
    return {
        "checkpoint": subject.given, "sha256": subject.sha256, "variant": _suffix(without).strip() or WHOLE,
        "without": list(without), "model_type": config.model_type,
        "parameters": accounting.parameters(config)["total"], "trained_context": config.max_position_embeddings,
        "tokenizer": tokenizer.fingerprint,
    }


def versions() -> dict[str, str]:
    """Of what took part."""
    ours = {"mm": mmcore.__version__, "python": platform.python_version()}
    return ours | {"torch": torch.__version__, "numpy": np.__version__}


def _memories(subject: Subject) -> tuple[str, ...]:
    """What can be removed of a checkpoint."""
    with torch.device("meta"):
        return type(build_model(subject.checkpoint.config).model.layers[0]).MEMORIES


def _variants(subject: Subject, without: Sequence[str]) -> list[tuple[str, ...]]:
    """Whole, and without the memories to remove where the model has them all."""
    removable = without and set(without) <= set(_memories(subject))
    return [(), tuple(without)] if removable else [()]


def _suffix(without: Sequence[str]) -> str:
    return f" without {', '.join(without)}" if without else ""


def _notes(
    subjects: Sequence[Subject], settings: SuiteSettings, lengths: Sequence[int], material: suite_data.Material
) -> list[str]:
    notes = []
    known = {memory for subject in subjects for memory in _memories(subject)}
    for memory in settings.without:
        if memory not in known:
            raise ConfigError(f"no checkpoint has a memory {memory!r} to remove: choose from {', '.join(sorted(known))}")
    for subject in subjects:
        trained = subject.checkpoint.config.max_position_embeddings
        if settings.without and len(_variants(subject, settings.without)) == 1:
            notes.append(f"{subject.given} has no {', '.join(settings.without)}: it is measured whole only")
        beyond = [length for length in lengths if length > trained]
        if material.new_knowledge and beyond:
            notes.append(f"{subject.given} was trained for {trained:,} tokens: lengths from {min(beyond):,} on lie beyond")
    for task in material.classifications:
        notes += [f"{task.name}: {note}" for note in task.notes]
        if pairs := prefixes(task.labels):
            notes.append(
                f"{task.name}: the label {pairs[0][0]!r} is the beginning of {pairs[0][1]!r} (such pairs: {len(pairs)}); "
                f"labels are scored with what ends them, so that both can be chosen"
            )
    if settings.ruler_exact:
        notes.append("qa prompts are built as published: a SQuAD question's paragraph is always in one place")
    return notes


def _shortened(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the benchmarks' rows say of texts that did not fit."""
    return [f"{row['task']}: {row['shortened']:,} texts were longer than the {result['trained_context']:,} tokens that "
            f"{result['checkpoint']} was trained for, and lost their beginning"
            for result in results if result["variant"] == WHOLE for row in result.get("persistent", []) if row["shortened"]]


def _passed_over(found: dict[str, list[str]], results: Sequence[dict[str, Any]]) -> list[str]:
    """Which tasks a checkpoint could not be measured on, and why. Raises DataError where nothing at all was measured."""
    notes = [f"passed over with {given}: {why}" for given, reasons in found.items() for why in dict.fromkeys(reasons)]
    if notes and not any(result.get(suite.replace("-", "_")) for result in results for suite in suite_data.SUITES):
        raise DataError(f"nothing was measured: {'; '.join(notes)}")
    return notes


def _sources(material: suite_data.Material, persistent: Any) -> dict[str, dict[str, str]]:
    """Where the data of every task are. Raises ConfigError for two tasks of one name."""
    others = persistent.hashes if persistent else {}
    for name in material.hashes.keys() & others.keys():
        raise ConfigError(f"{material.hashes[name]['path']} and {others[name]['path']} both are {name!r}: rename one")
    return material.hashes | others


def _persistent_tasks(settings: SuiteSettings, data: Sequence[str | Path]) -> Any:
    """The benchmarks, or None where the tasks that are asked for are all of other suites."""
    from mmcore.evaluation.persistent import benchmarks

    tasks = benchmarks.gather(data, settings.tasks, settings.online)
    if tasks is not None:
        from mmcore.evaluation import harness  # slow to import, and not needed without benchmarks
        from mmcore.evaluation.persistent.rehearsal import rehearse

        harness.require()
        for task in tasks.local:
            if task.group == OWN:
                rehearse(task)
    return tasks


def _persistent_job(
    tasks: Any, model: Any, tokenizer: Any, journal: Journal, identity: Any, settings: SuiteSettings,
    passed_over: list[str],
) -> Job:
    """`passed_over` takes the reasons of tasks that this model cannot score."""
    from mmcore.evaluation import harness

    def run(tick: Tick) -> list[dict[str, Any]]:
        return harness.measure(tasks, model, tokenizer, journal, identity, settings.limit, tick, passed_over, settings.seed)

    return Job("persistent", "benchmarks", tasks.cost(settings.limit), run)

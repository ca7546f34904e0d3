"""A user's own benchmark: a YAML or JSON file in the harness's terms, of which only data are accepted.

    task: capitals
    data: capitals.jsonl              # beside this file: JSON lines, a JSON list, or a CSV with a header
    output_type: multiple_choice
    doc_to_text: "The capital of {{country}} is"
    doc_to_choice: "{{cities}}"
    doc_to_target: "{{answer}}"

The harness would also run Python that a file names with `!function`, load data sets by scripts, and fetch metrics as
code: all that is refused. Templates are rendered in jinja's sandbox (harness.py).
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from mmcore.checkpoint.disk import hash_file
from mmcore.errors import DataError
from mmcore.evaluation.persistent import task_rows
from mmcore.evaluation.persistent.local import OWN, LocalTask, Rows, read_rows

OUTPUTS = ("multiple_choice", "generate_until", "loglikelihood", "loglikelihood_rolling")
METRICS = ("acc", "acc_norm", "exact_match", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
FILTERS = ("remove_whitespace", "take_first", "lowercase", "uppercase", "regex", "multi_choice_regex", "majority_vote")
KEYS = (
    "task", "data", "output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "description", "target_delimiter",
    "fewshot_delimiter", "num_fewshot", "generation_kwargs", "metric_list", "filter_list", "metadata",
)
_TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target", "description", "target_delimiter", "fewshot_delimiter")


def sandbox(nulls: bool = True) -> ImmutableSandboxedEnvironment:
    """An environment for the harness's templates that gives them data and no way out of it. Without `nulls` it raises
    ValueError where a template would write the word None."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=None if nulls else _no_null
    )
    environment.filters["regex_replace"] = lambda text, pattern, new, count=0: re.sub(pattern, new, text, count=count)
    return environment


def _no_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a field of it is empty (null)")
    return value


def is_task_file(path: Path) -> bool:
    """Whether a file given as data defines a task: any YAML, and JSON with the keys task and data."""
    if path.suffix in (".yaml", ".yml"):
        return True
    if path.suffix != ".json":
        return False
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"task", "data"} <= values.keys()


def load(path: Path) -> LocalTask:
    """The task of a file with its items. Raises DataError for one that is not plain data, or cannot be used."""
    values = _values(path)
    _check(values, path)
    source = path.parent / values["data"]
    rows = _rows(source, path)
    _try_templates(values, rows[0], path)
    task_rows.check_shots(values.get("num_fewshot"), rows, path, source)
    task_rows.check(values, rows, source, sandbox(nulls=False))
    settings = {key: value for key, value in values.items() if key not in ("task", "data")}
    return LocalTask(values["task"], OWN, settings, rows, f"{path}, {source}", hash_file(source).sha256)


def name_of(path: Path) -> str:
    """The name of the task that a file defines, as far as it does. Raises DataError where it is not plain data."""
    return str(_values(path).get("task"))


def _values(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        raise DataError(
            f"{path} holds code ({' '.join(str(error.problem).split())}): a task file may hold data only; write templates "
            f"instead of functions"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}): correct it") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} defines no task: it must hold keys such as task, data and doc_to_text")
    return values


def _check(values: dict[str, Any], path: Path) -> None:
    for key in values:
        if key not in KEYS:
            raise DataError(f"{path} has the key {key!r}, which a task file may not have: use {', '.join(KEYS)}")
    for key in ("task", "data", "doc_to_text", "doc_to_target"):
        if not isinstance(values.get(key), str):
            raise DataError(f"{path} lacks the text {key}: add it")
    for key in ("description", "target_delimiter", "fewshot_delimiter"):
        if not isinstance(values.get(key, ""), str):
            raise DataError(f"{path}: {key} is {values[key]!r}, which is no text: put it in quotes")
    if values.get("output_type") not in OUTPUTS:
        raise DataError(f"{path}: output_type is {values.get('output_type')!r}: choose from {', '.join(OUTPUTS)}")
    if values["output_type"] == "multiple_choice" and not values.get("doc_to_choice"):
        raise DataError(f"{path} lacks doc_to_choice, which gives the choices of multiple_choice: add it")
    if not isinstance(values.get("generation_kwargs") or {}, dict):
        raise DataError(f"{path}: generation_kwargs is {values['generation_kwargs']!r}: it must hold keys such as until")
    name = values["data"]
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{path}: data is {name!r}: name a file that lies beside the task file")
    _check_names(values.get("metric_list"), "metric", METRICS, path)
    for chain in _dicts(values.get("filter_list"), "filter_list", path):
        _check_names(chain.get("filter"), "function", FILTERS, path)


def _check_names(found: Any, key: str, known: tuple[str, ...], path: Path) -> None:
    for entry in _dicts(found, f"{key} list", path):
        if entry.get(key) not in known:
            raise DataError(f"{path}: {key} is {entry.get(key)!r}, which the harness would load as code: choose from "
                            f"{', '.join(known)}")
        if "aggregation" in entry and not isinstance(entry["aggregation"], str):
            raise DataError(f"{path}: aggregation is {entry['aggregation']!r}: name one, such as mean")


def _dicts(found: Any, what: str, path: Path) -> list[dict[str, Any]]:
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{path}: {what} is {found!r}: it must be a list of mappings")
    return found


def _rows(source: Path, path: Path) -> Rows:
    if not source.is_file():
        raise DataError(f"{path} takes its items from {source}, which is missing: put it there")
    if source.suffix.lower() != ".csv":
        return read_rows(source)
    return _csv_rows(source)


def _csv_rows(source: Path) -> Rows:
    try:
        lines = [line for line in csv.reader(io.StringIO(source.read_bytes().decode("utf-8-sig"), newline="")) if line]
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 (byte {error.start}): convert it") from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{source} cannot be read as CSV ({error}): correct it") from None
    if len(lines) < 2:
        raise DataError(f"{source} holds no rows: give a CSV with a header")
    header = lines[0]
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise DataError(f"row {number} of {source} has {len(line)} fields, its header {len(header)}: complete it, and "
                            "put fields with commas in quotes")
    return [dict(zip(header, line, strict=True)) for line in lines[1:]]


def _try_templates(values: dict[str, Any], row: dict[str, Any], path: Path) -> None:
    """Render every template once, in the sandbox, so that a bad one is found before the work."""
    environment = sandbox(nulls=False)
    for key in _TEMPLATES:
        template = values.get(key)
        if not isinstance(template, str) or template in row:
            continue
        try:
            environment.from_string(template).render(**row)
        except SecurityError as error:
            raise DataError(f"{path}: the template {key} holds code ({error}): a task file may hold data only") from None
        except task_rows.FAILURES as error:
            raise DataError(f"{path}: the template {key} fails on the first item ({error}): correct it") from None

"""A benchmark whose items were read from a file of the user's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcore.errors import DataError
from mmcore.evaluation.lines import lines_of

OWN = "own"
"""The group of the tasks that a user defines."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class LocalTask:
    """The harness's settings for it are plain values."""

    name: str
    group: str
    settings: dict[str, Any]
    rows: Rows
    path: str
    sha256: str


class Items(list):
    """As much of a data set as the harness asks of one. A table of Arrow's would fill fields that an item lacks with None,
    and refuse values of two kinds in one field."""

    @property
    def features(self) -> dict[str, None]:
        return {name: None for item in self for name in item}


def read_rows(path: Path) -> Rows:
    """The objects of a JSON list or of JSON lines. Raises DataError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if text.lstrip()[:1] == "[":
            values = json.loads(text)
        else:
            values = [json.loads(line) for line in lines_of(text) if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): get it anew") from None
    if not values or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{path} holds no items: it must be a list of JSON objects, or one a line")
    return values

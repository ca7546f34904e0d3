"""The results of single items as lines of JSON, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mmcore.errors import ConfigError, DataError, HardwareError

NAME = "items.jsonl"
SHOWN = 2000
"""Characters of a prompt's beginning and end that are kept with its result; the prompt itself follows from seed and data."""


def key_of(*parts: Any) -> str:
    """A hash of everything that decides an item's result, given as JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def shorten(text: str) -> str:
    """A text's beginning and end, for people to look at."""
    left_out = len(text) - 2 * SHOWN
    return text if left_out <= 0 else f"{text[:SHOWN]}\n[... {left_out:,} characters ...]\n{text[-SHOWN:]}"


def _is_result(record: dict[str, Any]) -> bool:
    return "head" not in record or "query" in record


class Journal:
    """Records by key, appended to a file as they come. A line that was cut off by a crash is dropped on opening."""

    def __init__(self, folder: str | Path) -> None:
        """Open or begin `folder`/items.jsonl. Raises DataError for a damaged one, ConfigError where another process
        writes to it, HardwareError where it cannot be written."""
        self.path = Path(folder) / NAME
        self.records: dict[str, dict[str, Any]] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise HardwareError(f"{self.path} cannot be written ({error.strerror}): give --out another folder") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"another evaluation is writing to {self.path}: wait for it, or give --out a new folder"
            ) from None
        self._read()
        self.found = sum(map(_is_result, self.records.values()))
        """Results that were there already; the beginnings of prompts, kept by themselves, are none."""
        self._before = set(self.records)
        self._used: set[str] = set()

    @property
    def used(self) -> int:
        """Those of the results found that were asked for: a folder may hold others, of another question."""
        return len(self._used)

    def _read(self) -> None:
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                self.records[record.pop("key")] = record
            except (ValueError, KeyError, AttributeError):
                raise DataError(f"line {number} of {self.path} is no result of an evaluation: remove the file") from None
            whole += len(line)
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)

    def get(self, key: str) -> dict[str, Any] | None:
        record = self.records.get(key)
        if key in self._before and _is_result(record):
            self._used.add(key)
        return record

    def put(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Keep a record, which must hold JSON values; it is in the file when this returns."""
        self.records[key] = record
        self._file.write(json.dumps({"key": key} | record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        return record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Token shards: a source's documents, tokenized once and kept on disk for every later run.

A source's shards lie in one folder named by what decides them: contents, tokenizer, the way documents are cut, and
the format. Shard N is `shard-N.bin` (token ids, little-endian uint16 or uint32), `shard-N.docs` (a DOCUMENT record
for each document), for conversations `shard-N.mask` (uint8, 1 where the loss counts the token as a target), and
last `shard-N.json` with sizes and hashes. A shard without its .json does not exist; `index.json`, written at the
very end, closes the set. A killed run therefore goes on after its last whole shard.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcore.data.documents import Source
from mmcore.data.files import disk_faults, remove_parts, write_atomically
from mmcore.data.shard_files import DOCUMENT, token_type
from mmcore.data.source_files import SourceFile, check_unchanged
from mmcore.data.tokenizer import Tokenizer
from mmcore.data.workers import Workers
from mmcore.errors import DataError

FORMATS = {"text": 2, "conversations": 3}
"""1 knew nothing of the line ends around a document and learnt answers of weight 0, and 2 encoded each role and content
as a text of its own. Shards of earlier formats are made anew."""

_SMALLEST_SHARD, _LARGEST_SHARD = 1 << 20, 64 << 20  # bytes of text
_SHARDS_WANTED = 256  # enough for even work and fine-grained resuming; few enough files
_ALONE_BELOW = 2 << 20  # bytes of text; a worker process takes about 0.3 s to start


@dataclass(frozen=True)
class Shard:
    """A whole shard: `stem` is its path without ending, `answers` counts what conversations have to learn that is not
    blank. `as_before`: the first format that gave the same tokens and masks."""

    stem: Path
    tokens: int
    documents: int
    bytes: int
    answers: int
    as_before: int


@dataclass(frozen=True)
class ShardSet:
    """All shards of a source. `identities` are those of `shard_identities`, the last of which names the folder."""

    folder: Path
    identities: tuple[str, ...]
    source_sha256: str
    dtype: np.dtype
    masked: bool
    shards: tuple[Shard, ...]

    def documents(self, shard: Shard) -> np.ndarray:
        """The DOCUMENT records of a shard, memory-mapped."""
        return np.memmap(shard.stem.with_suffix(".docs"), dtype=DOCUMENT, mode="r")


def shard_identities(source: Source, source_sha256: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """SHA-256 of everything that decides a source's shards, in each format from 1 to that of today."""
    facts = {
        "contents": source_sha256, "kind": source.kind, "text_key": source.config.text_key,
        "separator": source.config.separator, "tokenizer": tokenizer.fingerprint,
    }
    versions = range(1, FORMATS[source.kind] + 1)
    texts = (json.dumps(facts | {"format": version}, sort_keys=True) for version in versions)
    return tuple(hashlib.sha256(text.encode()).hexdigest() for text in texts)


def open_shards(cache: Path, identities: tuple[str, ...], *, verify: bool = False) -> ShardSet | None:
    """The finished set in the cache, or None where there is none or a file is missing, cut short or (verify) altered.

    A damaged shard loses its .json and the set its index, so that `tokenize` makes it anew and keeps the others.
    """
    folder = shard_folder(cache, identities)
    index = _read_json(folder / "index.json")
    if index is None or index.get("identity") != identities[-1]:
        return None
    shards = []
    for number in range(index["shards"]):
        stem = folder / f"shard-{number:05d}"
        shard = _whole(stem, verify)
        if shard is None:
            with disk_faults(folder):
                (folder / "index.json").unlink(missing_ok=True)
                stem.with_suffix(".json").unlink(missing_ok=True)
        else:
            shards.append(shard)
    if len(shards) < index["shards"]:
        return None
    dtype, masked = np.dtype(index["dtype"]), index["kind"] == "conversations"
    return ShardSet(folder, identities, index["contents"], dtype, masked, tuple(shards))


def shard_folder(cache: Path, identities: tuple[str, ...]) -> Path:
    """Where the shards of these identities lie."""
    return cache / identities[-1][:32]


def tokenize(source: Source, source_sha256: str, tokenizer: Tokenizer, cache: Path, *, workers: int = 1,
             on_position: Callable[[int], None] = lambda position: None, verify: bool = False) -> ShardSet:
    """The shards of `source`, made where they are not there yet.

    `workers` processes tokenize; `on_position` hears how many of the source's bytes are done. Of several processes
    that want the same shards one makes them and the others wait. Raises DataError for what the source or the disk
    refuses; whole shards stay for the next attempt, anything else is removed. Nothing stays where a file changes on the
    way, for `source_sha256` is not of what was read then.
    """
    identities = shard_identities(source, source_sha256, tokenizer)
    folder = shard_folder(cache, identities)
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _sole_maker(folder, on_position):
        found = open_shards(cache, identities, verify=verify)
        if found is not None:
            on_position(source.total_bytes)
            return found
        remove_parts(folder)
        try:
            count = _make_of_unchanged(source, tokenizer, folder, workers, on_position)
        finally:
            remove_parts(folder)
        index = {
            "format": len(identities), "identity": identities[-1], "identity_before": identities[0],
            "contents": source_sha256, "tokenizer": tokenizer.fingerprint, "kind": source.kind,
            "source": source.config.path, "dtype": token_type(tokenizer).str, "shards": count,
        }
        write_atomically(folder / "index.json", json.dumps(index, indent=1).encode())
        made = open_shards(cache, identities)
        if made is None:
            raise DataError(f"{folder} changed while it was written: let no other program write there")
        return made


def _make_of_unchanged(source: Source, tokenizer: Tokenizer, folder: Path, workers: int,
                       on_position: Callable[[int], None]) -> int:  # fmt: skip
    try:
        count = _make(source, tokenizer, folder, workers, on_position)
    except DataError:
        _refuse_changed(source, folder)  # a file that another program is writing may look damaged
        raise
    _refuse_changed(source, folder)
    return count


def _refuse_changed(source: Source, folder: Path) -> None:
    try:
        check_unchanged(source.files)
    except DataError:
        with disk_faults(folder):
            for path in folder.glob("shard-*"):
                path.unlink(missing_ok=True)
        raise


def _make(source: Source, tokenizer: Tokenizer, folder: Path, workers: int,
          on_position: Callable[[int], None]) -> int:
    """Write every shard that is not there yet; returns how many there are."""
    count = 0
    waiting: deque[tuple[Any, int]] = deque()

    def collect() -> None:
        job, position = waiting.popleft()
        job.result()
        on_position(position)

    alone = workers <= 1 or 0 < source.total_bytes < _ALONE_BELOW
    with Workers(tokenizer, source.kind, folder, 0 if alone else workers) as pool:
        for texts, position in _portions(source):
            stem = folder / f"shard-{count:05d}"
            count += 1
            if _whole(stem, verify=True) is not None:
                on_position(position)
                continue
            waiting.append((pool.submit(stem, texts), position))
            while len(waiting) > 2 * max(1, workers):
                collect()
        while waiting:
            collect()
    if count == 0:
        raise DataError(f"{source.config.path} holds no text, only empty documents: give a source that holds text")
    return count


def _portions(source: Source) -> Iterator[tuple[list[bytes], int]]:
    """The source's documents as UTF-8, in portions of one shard each, with the position reached in the source.

    Empty documents are passed over. Portions depend on the source alone, so that a resumed run cuts the same ones.
    Raises DataError before a portion of files that changed: a shard of it would outlive a killed process.
    """
    wanted = min(max(source.total_bytes // _SHARDS_WANTED, _SMALLEST_SHARD), _LARGEST_SHARD)
    texts: list[bytes] = []
    size = position = 0
    files: set[SourceFile] = set()
    for document in source.documents():
        position = document.position
        if document.file is not None:
            files.add(document.file)
        if not document.text.strip():
            continue
        texts.append(document.text.encode())
        size += len(texts[-1])
        if size >= wanted:
            check_unchanged(files)
            yield texts, position
            texts, size, files = [], 0, set()
    if texts:
        check_unchanged(files)
        yield texts, position


def _whole(stem: Path, verify: bool) -> Shard | None:
    """The shard at `stem` where every file has its size (and, with verify, its hash)."""
    facts = _read_json(stem.with_suffix(".json"))
    if facts is None:
        return None
    for ending, (size, digest) in facts["files"].items():
        path = stem.with_suffix(ending)
        try:
            if path.stat().st_size != size:
                return None
            if verify:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return None
        except FileNotFoundError:
            return None
    return Shard(stem, facts["tokens"], facts["documents"], facts["bytes"], facts["answers"], facts["as_before"])


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):  # absent, or cut short by a full disk of another program: make it anew
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


@contextlib.contextmanager
def _sole_maker(folder: Path, on_position: Callable[[int], None]) -> Iterator[None]:
    """Hold the folder's lock; while another process has it, report that one's progress by its finished shards."""
    with disk_faults(folder):
        lock = open(folder / "lock", "ab")  # noqa: SIM115 (held by the with below)
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                facts = [_read_json(path) for path in folder.glob("shard-*.json")]
                on_position(sum(shard["bytes"] for shard in facts if shard))
                time.sleep(0.2)
        yield

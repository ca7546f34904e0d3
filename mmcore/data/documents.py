"""Documents of a data source, in a fixed order, each as text.

A source is a file, a folder (searched to the bottom, in sorted order), `python-library`, or `hf:NAME[:SPLIT]`.
A document is a .txt file or a part of one between separators, a row of a .jsonl or .parquet file, or a help topic
of Python. Whatever cannot be used is an error that names the file and the place in it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mmcore.config import SourceConfig
from mmcore.config.words import expanded
from mmcore.data.conversations import BESIDE_MESSAGES, conversation_of
from mmcore.data.source_files import SourceFile, file_hash, file_state, find_files
from mmcore.errors import ConfigError, DataError

PYTHON_LIBRARY = "python-library"
HUGGING_FACE = "hf:"
TEXT_ENDINGS = (".txt", ".md", ".py", ".rst")
ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# Parts of Python's library that are tests, generated (config-* too), or no library of its own.
_LIBRARY_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo",
                     "ensurepip", "__pycache__", "__phello__"}
_BLOCK = 8 << 20  # bytes read at once from text files


@dataclass(frozen=True)
class Document:
    """One document, how far into the source's bytes on disk the reader stood once it was read, and its file (of `hf:`
    there is none)."""

    text: str
    position: int
    file: SourceFile | None = None


@dataclass
class Source:
    """A SourceConfig looked up on disk. `skipped` counts the endings of files that a folder holds beside text."""

    config: SourceConfig
    kind: str = "text"
    files: list[SourceFile] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    dataset: Any = None

    @property
    def total_bytes(self) -> int:
        """Bytes on disk (compressed ones as they are); for hf: the size the library states, or 0."""
        if self.dataset is not None:
            return int(getattr(self.dataset, "dataset_size", None) or 0)
        return sum(file.size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """The documents in order; conversations come as JSON text of their messages. Raises DataError."""
        if self.dataset is not None:
            for number, row in enumerate(self.dataset, 1):
                yield Document(self._row_text(row, f"row {number} of {self.config.path}"), 0)
            return
        before = 0
        for file in self.files:
            for document in self._file_documents(file):
                yield Document(document.text, before + document.position, file)
            before += file.size

    def _file_documents(self, file: SourceFile) -> Iterator[Document]:
        try:
            if file.name.endswith(ROW_ENDINGS):
                yield from self._rows(file)
            elif self.config.path == PYTHON_LIBRARY:
                for text in _python_documents(file):
                    yield Document(text, file.size)
            else:
                yield from _text_documents(file.path, self.config.separator)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"{file.path} cannot be read ({reason}): check the file and its permissions") from None

    def _rows(self, file: SourceFile) -> Iterator[Document]:
        if file.name.endswith(".parquet"):
            for number, row, position in _parquet_rows(file, self._key, self.kind):
                yield Document(self._row_text(row, f"{file.path}, row {number}"), position)
        else:
            for number, row, position in _json_rows(file.path, self.kind):
                yield Document(self._row_text(row, f"{file.path}, line {number}"), position)

    @property
    def _key(self) -> str:
        return "messages" if self.kind == "conversations" else self.config.text_key

    def _row_text(self, row: dict[str, Any], where: str) -> str:
        if self._key not in row:
            keys = ", ".join(map(repr, row)) or "nothing"
            raise DataError(f"{where} has no field {self._key!r}; it has {keys}: {_other_field(self.kind, row)}")
        value = row[self._key]
        if self.kind == "conversations":
            value = json.dumps(conversation_of(row, where), ensure_ascii=False)
        elif not isinstance(value, str):
            remedy = _AS_CONVERSATIONS if self._key == "messages" else "correct the row"
            raise DataError(f"{where}: {self._key!r} holds {type(value).__name__}, not text: {remedy}")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(f"{where} holds half of a surrogate pair, which is no text: correct the row") from None
        return value


_AS_CONVERSATIONS = "set data.kind to conversations to train on them (mm eval measures plain text alone)"
_ROWS = {"text": '{"text": "..."}', "conversations": '{"messages": [{"role": ..., "content": ...}, ...]}'}


def _other_field(kind: str, names: Iterable[str]) -> str:
    """What to do about rows that lack the field which is read and have these."""
    if kind == "conversations":
        return f"write rows such as {_ROWS[kind]}"
    return _AS_CONVERSATIONS if "messages" in names else "name one of these as text_key (mm eval: --text-key)"


def open_source(config: SourceConfig, kind: str = "text") -> Source:
    """Find what a SourceConfig names. Raises DataError where it is missing, empty or of an unknown sort, ConfigError
    where conversations are to be read from another field than messages."""
    source = Source(config, kind)
    if kind == "conversations" and config.text_key != SourceConfig.text_key:
        raise ConfigError(
            f"data.sources: {config.path} has the text_key {config.text_key!r}, which conversations do not know: leave it "
            f"out, and call the field of the rows 'messages'"
        )
    if config.path.startswith(HUGGING_FACE):
        source.dataset = _load_dataset(config.path)
        return source
    if config.path == PYTHON_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        source.files, source.skipped = find_files(root, (".py",), _is_no_library, follow=False)
        if not source.files:
            raise DataError(f"this Python has no library sources in {root}: install them or give another data source")
    else:
        root = Path(expanded(config.path, DataError))
        if not root.exists():
            raise DataError(f"there is no file or folder {root}: check the path")
        if root.is_dir():
            endings = ROW_ENDINGS if kind == "conversations" else TEXT_ENDINGS + ROW_ENDINGS
            source.files, source.skipped = find_files(root, endings)
        else:
            source.files = [_single(root, kind)]
        if not source.files and kind != "conversations":
            raise DataError(f"{root} holds no text: it needs {' '.join(TEXT_ENDINGS + ROW_ENDINGS)} files")
    rows = [file.name.endswith(ROW_ENDINGS) for file in source.files]
    if kind == "conversations" and not (rows and all(rows)):
        raise DataError(f"{root} holds no conversations: give {' '.join(ROW_ENDINGS)} files with messages")
    if source.total_bytes == 0:
        raise DataError(f"{root} is empty: give a source that holds text")
    return source


def _single(path: Path, kind: str) -> SourceFile:
    if not path.name.endswith(TEXT_ENDINGS + ROW_ENDINGS):
        known = " ".join(ROW_ENDINGS if kind == "conversations" else TEXT_ENDINGS + ROW_ENDINGS)
        raise DataError(f"{path} is of an unknown sort: rename or convert it to one of {known}")
    return SourceFile.found(path.name, path)


def _is_no_library(folder: str) -> bool:
    return folder in _LIBRARY_LEFT_OUT or folder.startswith("config-")


def left_out(path: str, skipped: Mapping[str, int]) -> str:
    """The sentence on the files of a folder that are not read, for `Source.skipped`."""
    endings = ", ".join(f"{count} {ending}" for ending, count in skipped.items())
    return f"{path} holds files that are no text and were left out: {endings}"


# --- text files ---


def _text_documents(path: Path, separator: str | None) -> Iterator[Document]:
    """Documents of a text file: what stands between separators, less the line breaks around it; else all of it."""
    mark = separator.encode() if separator else b""
    with open(path, "rb") as file:
        if not mark:
            yield from _text_part(path, file.read(), 0, parted=False)
            return
        rest, start, parted = bytearray(), 0, False
        while block := file.read(_BLOCK):
            seen = max(0, len(rest) - len(mark) + 1)  # a separator may lie across two blocks
            rest += block
            if rest.find(mark, seen) < 0:
                continue
            parted = True
            *parts, rest = rest.split(mark)
            for part in parts:
                yield from _text_part(path, part, start, parted)
                start += len(part) + len(mark)
        yield from _text_part(path, rest, start, parted)


def _text_part(path: Path, part: bytes | bytearray, start: int, parted: bool) -> Iterator[Document]:
    if b"\0" in part:
        raise DataError(f"{path} is binary (a zero byte at byte {start + part.index(0)}): give UTF-8 text")
    try:
        text = part.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {start + error.start}: convert it (iconv -t UTF-8)") from None
    yield Document(text.strip("\r\n") if parted else text, start + len(part))


def _python_documents(file: SourceFile) -> Iterator[str]:
    """A module's source, in the encoding it declares; for Python's help, the topics."""
    if file.name == "pydoc_data/topics.py":
        topics = importlib.import_module("pydoc_data.topics").topics
        yield from (topics[name] for name in sorted(topics))
        return
    try:
        with tokenize.open(file.path) as stream:
            yield stream.read()
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{file.path} of Python's library cannot be read ({error}): repair the installation") from None


# --- rows ---


def _json_rows(path: Path, kind: str) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Line number (from 1), row, position in the file on disk. Blank lines are passed over."""
    with open(path, "rb") as raw, _uncompressed(path, raw) as stream:
        number = 0
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                yield number, _json_row(path, number, line, kind), raw.tell()
        except (EOFError, gzip.BadGzipFile, _zstd_error()) as error:
            raise DataError(f"{path} is damaged after line {number} ({error}): fetch it again") from None


def _json_row(path: Path, number: int, line: bytes, kind: str) -> dict[str, Any]:
    if b"\0" in line:
        raise DataError(f"{path}, line {number} holds zero bytes: the file is binary or damaged; give JSON lines")
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number} is not UTF-8 at byte {error.start} of the line: convert it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number} is not JSON ({error}): correct or remove the line") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number} is no JSON object: write rows such as {_ROWS[kind]}")
    return row


def _uncompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
    if path.name.endswith(".zst"):
        zstandard = _library("zstandard", "zstd", str(path))
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
    return raw


def _zstd_error() -> type[Exception]:
    try:
        import zstandard
    except ImportError:
        return EOFError
    return zstandard.ZstdError


def _parquet_rows(file: SourceFile, key: str, kind: str) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Row number (from 1), the columns of the row that are read, position in the file by share of rows read."""
    _library("pyarrow", "parquet", str(file.path))
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        names = table.schema_arrow.names
        if key not in names:
            found, remedy = ", ".join(map(repr, names)), _other_field(kind, names)
            raise DataError(f"{file.path} has no column {key!r}; it has {found}: {remedy}")
        read = [key, *(name for name in BESIDE_MESSAGES if name in names and kind == "conversations")]
        rows, number = max(1, table.metadata.num_rows), 0
        for batch in table.iter_batches(batch_size=1024, columns=read):
            for row in batch.to_pylist():
                number += 1
                yield number, row, file.size * number // rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.path} is no whole parquet file ({' '.join(str(error).split())}): fetch it again") from None


def _library(name: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise DataError(f"{what} needs the library {name}: pip install 'mm[{extra}]'") from None


def _load_dataset(path: str) -> Any:
    datasets = _library("datasets", "datasets", path)
    name, _, split = path.removeprefix(HUGGING_FACE).partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise DataError(f"{path} cannot be loaded ({' '.join(str(error).split())}): check its name and split") from None


# --- what a source holds, as a hash ---


class HashBook:
    """SHA-256 of files, remembered by path and State in a JSON file. A copied or restored file is hashed again."""

    def __init__(self, file: Path):
        self._file = file
        self._known: dict[str, list[Any]] = {}  # the State, and the hash
        self._fresh = False
        try:
            known = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):  # a missing or damaged book only costs hashing again
            known = {}
        if isinstance(known, dict):
            self._known = {key: entry for key, entry in known.items() if isinstance(entry, list) and len(entry) == 4}

    def sha256(self, path: Path) -> str:
        """The file's hash. Raises DataError where it cannot be read."""
        try:
            state = list(file_state(path))
            key = str(path.resolve())
            entry = self._known.get(key)
            if entry is not None and entry[:3] == state:
                return entry[3]
            digest = file_hash(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
        self._known[key] = [*state, digest]
        self._fresh = True
        return digest

    def write(self, now_ns: int) -> None:
        """Remember the hashes, but for files changed in the last 2 s: a further change might not move their time."""
        if not self._fresh:
            return
        from mmcore.data.files import write_atomically

        settled = {key: entry for key, entry in self._known.items() if now_ns - max(entry[1:3]) > 2_000_000_000}
        write_atomically(self._file, json.dumps(settled).encode())
        self._fresh = False


def source_hash(source: Source, book: HashBook) -> str:
    """SHA-256 over the names and contents of a source's files; for hf: the library's own fingerprint. The files keep
    theirs."""
    digest = hashlib.sha256()
    if source.dataset is not None:
        digest.update(f"hf:{source.dataset._fingerprint}".encode())
    for file in source.files:
        file.sha256 = book.sha256(file.path)
        digest.update(f"{file.name}\0{file.sha256}\n".encode())
    return digest.hexdigest()

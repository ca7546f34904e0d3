"""The text that a model is measured on: which documents, and how much of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmcore.config import SourceConfig, load_recipe
from mmcore.data.documents import PYTHON_LIBRARY, left_out, open_source
from mmcore.errors import ConfigError, DataError

SPARE_TOKENS = 64
"""A document is cut to what is left of the budget only where more than this is left."""


@dataclass(frozen=True)
class Text:
    """Documents in order, and what to call them."""

    documents: list[str]
    name: str
    sha256: str
    """Of the documents, each with its length: equal means the same text."""
    unfinished: int | None = None
    """Index of a document that was cut, and so has no end to predict."""
    notes: tuple[str, ...] = ()
    """Sentences on what was given and not read."""

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(document.encode("utf-8")) for document in self.documents)


def make_text(documents: list[str], name: str) -> Text:
    """A Text of the documents that are not blank. Raises DataError where none is left."""
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{name} holds no text: give files with words in them")
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode("utf-8")
        digest.update(len(content).to_bytes(8, "little") + content)
    return Text(documents, name, digest.hexdigest())


def read_files(paths: Sequence[str | Path], text_key: str = "text") -> Text:
    """The documents of files and folders, read as `data.sources` of a recipe are, each file once. Raises DataError."""
    documents: list[str] = []
    notes, read, names = [], set(), []
    for path in map(str, paths):
        source = open_source(SourceConfig(path=path, text_key=text_key))
        if source.skipped and path != PYTHON_LIBRARY:
            notes.append(left_out(path, source.skipped))
        parts = {file.path.resolve() for file in source.files} or {path}  # a data set of hf: has no files
        if again := len(parts & read):
            what = path if again == len(parts) else f"{again} of the {len(parts)} files in {path}"
            notes.append(f"given more than once and counted once: {what}")
            source.files = [file for file in source.files if file.path.resolve() not in read]
        if parts <= read:
            continue
        read |= parts
        names.append(path)
        documents += [document.text for document in source.documents()]
    return replace(make_text(documents, ", ".join(names)), notes=tuple(dict.fromkeys(notes)))


def held_out_text(checkpoint: str | Path) -> Text:
    """The documents that a checkpoint's run held out of its training, as text.

    Raises ConfigError where the checkpoint does not know its run (an exported one) or has learnt conversations, and
    DataError where the data are not those that it was trained on: what is held out of others may have been learnt.
    """
    from mmcore.checkpoint.resolve import resolve_checkpoint
    from mmcore.checkpoint.store import load_state
    from mmcore.data import prepare
    from mmcore.data.tokenizer_files import load_tokenizer

    folder = resolve_checkpoint(checkpoint)
    saved = folder / "recipe.yaml"
    if folder.is_file() or not saved.is_file():
        raise ConfigError(f"{checkpoint} does not know which text was held out of its training: give --data FILE")
    data = load_recipe(saved).data
    if data.kind != "text":
        raise ConfigError(f"{checkpoint} was trained on {data.kind}, which are no plain text: give --data with plain text")
    tokenizer = load_tokenizer(folder)
    corpus = prepare(data, tokenizer)
    if load_state(folder).state.get("data_identity", corpus.fingerprint["identity"]) != corpus.fingerprint["identity"]:
        raise DataError(
            f"the data that the recipe of {checkpoint} names are not those it was trained on (they changed, lie elsewhere "
            f"seen from this folder, or an earlier mm held others of them out), so what they hold out now may have been "
            f"learnt: restore them, or give --data FILE"
        )
    store = corpus.validation
    if store is None:
        raise ConfigError(f"the run of {checkpoint} held no text out of its training: give --data FILE")
    documents = []
    for stream in store.streams:
        place = 0
        for length in stream.document_lengths().tolist():
            ids = stream.read(place, length).tolist()
            documents.append(tokenizer.decode(ids))  # begin and end tokens stand for no text
            place += length
    return make_text(documents, f"text held out of {checkpoint}")


def sample(text: Text, encode: Callable[[str], list[int]], most_tokens: int | None) -> Text:
    """At most `most_tokens` tokens of a text: whole documents, drawn in the order of a hash of their content so that
    no file is preferred, the last one cut to what is left, and put back in the text's order. None: all of it.

    Cutting is by characters, so the sample is text of exact bytes that any tokenizer can encode.
    """
    if most_tokens is None:
        return text
    order = sorted(range(len(text.documents)), key=lambda index: _hash(text.documents[index]))
    chosen: dict[int, str] = {}
    left, unfinished = most_tokens, None
    for index in order:
        document = text.documents[index]
        # A book is not tokenized whole for a few thousand tokens: text of 16 characters a token does not occur.
        document = text.documents[index][: 16 * left]
        count = len(encode(document)) + 1  # the end token
        whole = count <= left and document == text.documents[index]
        if not whole:
            if chosen and left < SPARE_TOKENS:
                break
            document, unfinished = _cut(document, encode, left), index
        chosen[index] = document
        left -= count
        if left <= 0:
            break
    kept = sorted(index for index, document in chosen.items() if document.strip())
    found = make_text([chosen[index] for index in kept], text.name)
    return replace(found, unfinished=kept.index(unfinished) if unfinished in kept else None)


def _cut(document: str, encode: Callable[[str], list[int]], most_tokens: int) -> str:
    """The longest beginning found that encodes to at most `most_tokens` tokens, within a few percent."""
    kept = document
    while kept and (count := len(encode(kept))) > most_tokens:
        kept = kept[: min(len(kept) - 1, int(len(kept) * max(0, most_tokens) / count))]
    return kept


def _hash(document: str) -> bytes:
    return hashlib.sha256(document.encode("utf-8")).digest()

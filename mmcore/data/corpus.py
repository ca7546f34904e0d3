"""From a recipe's data section to token stores: shards made or found, held-out documents set apart."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcore import processors
from mmcore.config import DataConfig, SourceConfig, TokenizerConfig
from mmcore.config.words import cache_root
from mmcore.data.conversations import CHAT_TEMPLATE
from mmcore.data.documents import HashBook, Source, open_source, source_hash
from mmcore.data.files import disk_faults, write_atomically
from mmcore.data.sentencepiece_model import train_sentencepiece
from mmcore.data.shard_files import DOCUMENT, document_record
from mmcore.data.shards import ShardSet, open_shards, shard_identities, tokenize
from mmcore.data.source_files import check_unchanged
from mmcore.data.splitting import HeldOut, Split, choose_held_out, split_documents, words_of
from mmcore.data.store import Stream, TokenStore
from mmcore.data.tokenizer import Tokenizer
from mmcore.data.tokenizer_files import load_tokenizer
from mmcore.errors import DataError

Progress = Callable[[int, int, float], None]
"""Hears (bytes done, bytes in all, bytes per second) of tokenizing; bytes of files as they lie on disk."""

_READ_TWICE_BELOW = 1 << 28  # bytes; larger data holds so many documents that the threshold alone decides


@dataclass(frozen=True)
class Corpus:
    """Tokenized data: `validation` is None where nothing is held out. `fingerprint` is plain JSON for the record;
    its "identity" is equal exactly where the tokens and their split are."""

    train: TokenStore
    validation: TokenStore | None
    fingerprint: dict[str, Any]


def cache_folder(data: DataConfig) -> Path:
    """Where tokenized shards lie: data.cache, else $MM_CACHE/data, else ~/.cache/mm/data. Raises DataError where a user
    has no such place."""
    return Path(data.cache) if data.cache else cache_root(DataError) / "data"


def prepare(data: DataConfig, tokenizer: Tokenizer, *, progress: Progress | None = None,
            verify: bool = False) -> Corpus:
    """Tokenize what is not tokenized yet and split it. `verify` hashes the shards found, besides their sizes.

    Raises DataError for every fault of the sources, the tokenizer or the disk, naming the file and the remedy.
    """
    if not data.sources:
        raise DataError("the recipe names no data: add data.sources, such as [{path: python-library}]")
    tokenizer.frame()
    cache = cache_folder(data)
    configs = [*data.sources, *data.validation]
    sources = [open_source(config, data.kind) for config in configs]
    hashes = _hashes(sources, cache)
    sets = _all_shards(sources, hashes, tokenizer, cache, data.workers or processors.allowed(), progress, verify)
    names = [config.path for config in configs]
    if data.kind == "conversations":
        _refuse_blank_answers(sets[:len(data.sources)], names)
    split = split_documents(sets[:len(data.sources)], sets[len(data.sources):], names, data)
    begin, end = tokenizer.frame()
    given = [config.weight for config in data.sources if config.weight is not None]
    weights = tuple(given) if given else None
    fingerprint = _fingerprint(split, sources, tokenizer, data)
    train = TokenStore(tuple(split.train), weights, begin, end, data.kind, fingerprint)
    if train.tokens == 0:
        raise DataError(
            "no text is left to train on, for data.validation holds every document of data.sources: give other documents "
            "in one of the two"
            if data.validation
            else "no text is left to train on once validation is held out: give more text or lower data.validation_fraction"
        )
    validation = None
    if any(stream.tokens for stream in split.validation):
        validation = TokenStore(tuple(split.validation), None, begin, end, data.kind, fingerprint)
    return Corpus(train, validation, fingerprint)


def _refuse_blank_answers(sets: Sequence[ShardSet], names: Sequence[str]) -> None:
    for shards, name in zip(sets, names, strict=False):
        if not any(shard.answers for shard in shards.shards):
            raise DataError(f"every answer in {name} is blank, so there is nothing to learn from it: give conversations "
                            f"whose assistant says something, or leave it out of data.sources")


def _hashes(sources: Sequence[Source], cache: Path) -> list[str]:
    with disk_faults(cache):
        cache.mkdir(parents=True, exist_ok=True)
    book = HashBook(cache / "hashes.json")
    hashes = [source_hash(source, book) for source in sources]
    book.write(time.time_ns())
    return hashes


def _all_shards(sources: Sequence[Source], hashes: Sequence[str], tokenizer: Tokenizer, cache: Path, workers: int,
                progress: Progress | None, verify: bool) -> list[ShardSet]:
    """The shards of every source; `progress` counts only those that have to be made."""
    sets: list[ShardSet | None] = []
    for source, digest in zip(sources, hashes, strict=True):
        sets.append(open_shards(cache, shard_identities(source, digest, tokenizer), verify=verify))
    total = sum(source.total_bytes for source, found in zip(sources, sets, strict=True) if found is None)
    before, started = 0, time.monotonic()

    def heard(position: int) -> None:
        if progress is not None:
            done = before + position
            progress(min(done, total), total, done / max(1e-9, time.monotonic() - started))

    for number, source in enumerate(sources):
        if sets[number] is None:
            sets[number] = tokenize(source, hashes[number], tokenizer, cache, workers=workers, on_position=heard)
            before += source.total_bytes
    return [found for found in sets if found is not None]


def _fingerprint(split: Split, sources: Sequence[Source], tokenizer: Tokenizer, data: DataConfig) -> dict[str, Any]:
    def side(streams: Sequence[Stream], weights: Sequence[float | None]) -> list[dict[str, Any]]:
        return [
            {"source": stream.name, "sha256": stream.shards.source_sha256, "shards": _data_identity(stream.shards),
             "weight": weight, "tokens": stream.tokens, "documents": stream.documents, "bytes": stream.bytes}
            for stream, weight in zip(streams, weights, strict=True)
        ]

    record = {
        "tokenizer": tokenizer.fingerprint,
        "kind": data.kind,
        "held_out": split.how,
        "excluded_from_training": split.excluded,
        "train": side(split.train, [config.weight for config in data.sources]),
        "validation": side(split.validation, [None] * len(split.validation)),
    }
    essence = json.dumps([
        record["tokenizer"], record["kind"], record["held_out"],
        *[[row[key] for key in ("shards", "weight", "tokens")] for part in ("train", "validation")
          for row in record[part]],
    ])
    record["files"] = {
        source.config.path: {"files": len(source.files), "bytes": source.total_bytes, "skipped": dict(source.skipped)}
        for source in sources
    }
    record["identity"] = hashlib.sha256(essence.encode()).hexdigest()
    return record


def _data_identity(shards: ShardSet) -> str:
    """The name of what a run learns: that of the first format that gave the same, so that runs begun with it go on."""
    return shards.identities[max(shard.as_before for shard in shards.shards) - 1]


# --- the tokenizer of a recipe ---


def obtain_tokenizer(config: TokenizerConfig, data: DataConfig, vocab_size: int) -> Tokenizer:
    """The recipe's tokenizer: the one at tokenizer.path, or one trained on its training documents.

    A trained one is kept beside the shards and found again. `vocab_size` (model.vocab_size) is the default size.
    Raises DataError.
    """
    if config.path is not None:
        return load_tokenizer(config.path)
    if not data.sources:
        raise DataError("there is no text to train a tokenizer on: add data.sources or give tokenizer.path")
    cache = cache_folder(data)
    sources = [open_source(source, data.kind) for source in data.sources]
    size = config.train_vocab_size or vocab_size
    facts = [_hashes(sources, cache), [_facts(source) for source in data.sources], data.kind, size,
             config.train_megabytes, data.validation_fraction if not data.validation else 0,
             2 if data.kind == "conversations" else 1]  # 1 read no system text beside the messages
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    folder = cache.parent / "tokenizers" / key if not data.cache else cache / "tokenizers" / key
    if (folder / "tokenizer.model").is_file() and (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(folder)
    tokenizer = train_sentencepiece(_training_texts(sources, config, data), size)
    for source in sources:
        check_unchanged(source.files)  # else it would be kept under the hash of another text
    tokenizer.chat_template = CHAT_TEMPLATE
    for name, content in tokenizer.files().items():
        write_atomically(folder / name, content)
    return load_tokenizer(folder)


def _facts(source: SourceConfig) -> list[Any]:
    return [source.weight, source.text_key, source.separator]


def _training_texts(sources: Sequence[Source], config: TokenizerConfig, data: DataConfig) -> Iterator[str]:
    """Text of the sources in the shares they are trained in, within train_megabytes; no held-out document.

    Files are taken in an order drawn by their names' hashes, so that a part of a large source is no one-sided part.
    """
    budget = config.train_megabytes * 1e6
    shares = [source.config.weight or max(1, source.total_bytes) for source in sources]
    held_out = _held_out_of(sources, data)
    for source, share in zip(sources, shares, strict=True):
        left = budget * share / sum(shares)
        files = sorted(source.files, key=lambda file: hashlib.sha256(file.name.encode()).digest())
        shuffled = Source(source.config, source.kind, files, dataset=source.dataset)
        for document in shuffled.documents():
            text = document.text
            if held_out is not None and held_out(_table([text]))[0]:
                continue
            if source.kind == "conversations":
                text = "\n\n".join(message["content"] for message in json.loads(text))
            yield text[:int(left) + 1]
            left -= len(text.encode())
            if left <= 0:
                break


def _held_out_of(sources: Sequence[Source], data: DataConfig) -> Callable[[np.ndarray], np.ndarray] | None:
    """Which documents `prepare` will hold out, or leave out with them, before anything is tokenized."""
    if data.validation or data.validation_fraction == 0:
        return None
    if sum(source.total_bytes for source in sources) > _READ_TWICE_BELOW:
        return HeldOut.below(data.validation_fraction).records
    tables = [_table([document.text for document in source.documents() if document.text.strip()])
              for source in sources]
    chosen = choose_held_out(tables, data.validation_fraction, data.kind)
    if chosen is None:
        return None
    words = words_of(tables, chosen.records)
    return lambda table: np.isin(table["words"], words)


def _table(texts: Sequence[str]) -> np.ndarray:
    return np.array([document_record(text.encode()) for text in texts], DOCUMENT)

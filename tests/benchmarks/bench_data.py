"""Training a vocabulary and tokenizing: seconds and MB/s on real books, beside the bare libraries.

    python -m tests.benchmarks.bench_data [--json FILE]

Times are CPU seconds of one process where the work is in one, so that a busy machine does not blur them; both
sides alternate in one run. The whole `prepare` is wall time over 1 and 2 processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from mmcore.config import DataConfig, SourceConfig
from mmcore.data import Samples, Tokenizer, load_tokenizer, prepare, train_sentencepiece
from mmcore.data.loader import make_batch
from tests.helpers.real_data import DATA

BOOKS = DATA / "lmtext/books_children"


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def medians(works: dict[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Median CPU seconds of each, alternating."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(cpu_seconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


def bench_training(texts: list[str], folder: Path) -> dict[str, float]:
    """Seconds, wall and CPU, to train 8,192 pieces (20 MB) and 4,096 (10 MB)."""
    results = {}
    for size, megabytes in ((8192, 20), (4096, 10)):
        chosen, left = [], megabytes * 1_000_000
        for text in texts:
            chosen.append(text[:left])
            left -= len(chosen[-1])
        started, cpu = time.perf_counter(), time.process_time()
        train_sentencepiece(chosen, size, folder / str(size))
        results[f"train {size} on {megabytes} MB, wall s"] = time.perf_counter() - started
        results[f"train {size} on {megabytes} MB, cpu s"] = time.process_time() - cpu
    return results


def bench_encoding(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """MB/s of one core, ours by lines and sentencepiece on whole books."""
    part = texts[:10]
    size = sum(len(text.encode()) for text in part) / 1e6
    bare = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model.file_bytes)
    ids = tokenizer.encode_batch(part)
    assert ids == bare.encode(part)
    seconds = medians({
        "encode": lambda: tokenizer.encode_batch(part),
        "sentencepiece on whole books": lambda: [bare.encode(text) for text in part],
        "decode": lambda: [tokenizer.decode(row) for row in ids],
    })
    return {f"{name}, MB/s a core": size / value for name, value in seconds.items()}


def bench_prepare(tokenizer: Tokenizer, size: float) -> dict[str, float]:
    """MB/s of the whole preparation, by wall time; then seconds to find it again, and to make a batch."""
    results = {}
    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as cache:
            data = DataConfig(sources=(SourceConfig(str(BOOKS)),), cache=cache, workers=workers)
            started = time.perf_counter()
            corpus = prepare(data, tokenizer)
            results[f"prepare with {workers} processes, MB/s"] = size / (time.perf_counter() - started)
            started = time.perf_counter()
            prepare(data, tokenizer)
            results[f"prepare again after {workers}, s"] = time.perf_counter() - started
            samples = Samples(corpus.train, 4096)
            results["batch of 8 x 4096, ms"] = 1e3 * cpu_seconds(
                lambda samples=samples: [make_batch(samples, range(n, n + 8)) for n in range(0, 160, 8)]) / 20
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    texts = [path.read_text("utf-8") for path in sorted(BOOKS.glob("*.txt"))]
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        results = bench_training(texts, Path(folder))
        tokenizer = load_tokenizer(Path(folder) / "8192")
        results |= bench_encoding(tokenizer, texts)
        results |= bench_prepare(tokenizer, size)
        results["bytes a token"] = size * 1e6 / sum(map(len, tokenizer.encode_batch(texts)))
    for name, value in results.items():
        print(f"{name:45} {value:8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

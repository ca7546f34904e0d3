"""Processes that tokenize portions of documents into shards.

Each is a fresh Python (`python -m mmcore.data.workers FOLDER KIND`) fed over pipes, neither forked nor spawned by
multiprocessing: nothing is inherited from a process that holds threads and locks (torch), the caller's script need
not guard its main module, and it works from a notebook. A request is one JSON line {"stem", "lengths"} and the
documents' bytes; the answer is one JSON line, {} or {"error"}.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Self

import mmcore
from mmcore.data.files import write_atomically
from mmcore.data.shard_files import write_shard
from mmcore.data.tokenizer import Tokenizer
from mmcore.data.tokenizer_files import load_tokenizer
from mmcore.errors import DataError


class Workers:
    """`count` tokenizing processes, or none: then `submit` does the work itself. Use it in a `with` block."""

    def __init__(self, tokenizer: Tokenizer, kind: str, folder: Path, count: int):
        self._tokenizer, self._kind, self._folder = tokenizer, kind, folder
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads: concurrent.futures.ThreadPoolExecutor | None = None
        if count:
            for name, content in tokenizer.files().items():
                write_atomically(folder / "tokenizer" / name, content)
            self._threads = concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="tokenize")
            for _ in range(count):
                self._start()

    def _start(self) -> None:
        environment = dict(os.environ)
        root = str(Path(mmcore.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        # one core each: the tokenizers library and numpy would otherwise start a thread for every core
        environment.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "mmcore.data.workers", str(self._folder / "tokenizer"), self._kind]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._processes.append(process)
        self._idle.put(process)

    def submit(self, stem: Path, texts: Sequence[bytes]) -> concurrent.futures.Future[None]:
        """Write the shard `stem` of these documents; the future raises DataError where that failed."""
        if self._threads is not None:
            return self._threads.submit(self._send, stem, texts)
        write_shard(stem, texts, self._tokenizer, self._kind)
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        done.set_result(None)
        return done

    def _send(self, stem: Path, texts: Sequence[bytes]) -> None:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            request = {"stem": str(stem), "lengths": [len(text) for text in texts]}
            process.stdin.write(json.dumps(request).encode() + b"\n")
            for text in texts:
                process.stdin.write(text)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            self._idle.put(process)
        if not answer.endswith(b"\n"):
            code = process.wait()
            raise DataError(
                f"a tokenizing process ended (status {code}), perhaps for lack of memory: lower data.workers; finished "
                f"shards are kept"
            )
        if message := json.loads(answer).get("error"):
            raise DataError(message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdout.close()
            try:
                process.stdin.close()
            except BrokenPipeError:  # a request that was still in the buffer of a killed process
                pass


def _serve(folder: str, kind: str) -> None:
    """Answer requests on standard input until it ends, which it also does when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # a library that prints must not talk into the answers
    tokenizer = load_tokenizer(folder)
    while line := requests.readline():
        request = json.loads(line)
        texts = [_read_exactly(requests, length) for length in request["lengths"]]
        answer = {}
        try:
            write_shard(Path(request["stem"]), texts, tokenizer, kind)
        except DataError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer).encode() + b"\n")


def _read_exactly(stream: IO[bytes], length: int) -> bytes:
    content = stream.read(length)
    if len(content) < length:
        raise SystemExit(0)  # the parent is gone
    return content


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])

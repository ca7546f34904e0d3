"""Token shards: what they hold, and that no fault leaves anything half-made."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import mmcore
from mmcore.config import DataConfig, SourceConfig
from mmcore.data import load_tokenizer, prepare, shard_files, shards, source_files, workers
from mmcore.data.corpus import cache_folder
from mmcore.data.documents import open_source
from mmcore.data.files import PART_MARK
from mmcore.data.source_files import file_hash
from mmcore.data.workers import Workers
from mmcore.errors import DataError

ROOT = Path(mmcore.__file__).parents[1]


def write_documents(path: Path, library_text: str, megabytes: float) -> list[str]:
    """A jsonl of distinct documents, pieces of Python's library."""
    rows, size, number = [], 0, 0
    while size < megabytes * 1e6:
        start = number * 977 % (len(library_text) - 4000)
        rows.append(f"{number} é\n" + library_text[start:start + 500 + number * 131 % 3000])
        size += len(rows[-1].encode())
        number += 1
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return rows


def config(path: Path, cache: Path, **keys) -> DataConfig:
    return DataConfig(sources=(SourceConfig(str(path)),), cache=str(cache), **{"workers": 1, **keys})


def folder_of(cache: Path) -> Path:
    (index,) = [path for path in cache.iterdir() if path.is_dir()]
    return index


def contents(cache: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder_of(cache).glob("shard-*"))}


def no_parts(cache: Path) -> bool:
    return not list(cache.rglob(f"*{PART_MARK}*"))


SCRIPT = """
import sys
from mmcore.config import DataConfig, SourceConfig
from mmcore.data import load_tokenizer, prepare
source, cache, tokenizer, workers = sys.argv[1:]
data = DataConfig(sources=(SourceConfig(source),), cache=cache, workers=int(workers))
print(prepare(data, load_tokenizer(tokenizer)).fingerprint["identity"])
"""


def start(source: Path, cache: Path, tokenizer: Path, workers: int) -> subprocess.Popen:
    """`prepare` in a process of its own, from a script without a guarded main module."""
    command = [sys.executable, "-c", SCRIPT, str(source), str(cache), str(tokenizer), str(workers)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_shards_hold_each_document_framed_in_order(small_tokenizer, library_text, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SMALLEST_SHARD", 20_000)
    rows = write_documents(tmp_path / "a.jsonl", library_text, 0.1)
    heard = []
    corpus = prepare(config(tmp_path / "a.jsonl", tmp_path / "cache", validation_fraction=0.0), small_tokenizer,
                     progress=lambda *values: heard.append(values))
    (stream,) = corpus.train.streams
    expected = [i for row in rows for i in (1, *small_tokenizer.encode(row), 2)]
    assert len(stream.shards.shards) >= 4
    assert stream.tokens == corpus.train.tokens == len(expected)
    assert stream.read(0, stream.tokens).tolist() == expected
    assert stream.read(len(expected) - 3, 10).tolist() == expected[-3:]
    for begin in range(0, len(expected), 997):
        assert stream.read(begin, 1500).tolist() == expected[begin:begin + 1500]
    assert corpus.train.bytes == sum(len(row.encode()) for row in rows)
    assert corpus.train.documents == len(rows)
    assert corpus.validation is None
    assert stream.document_lengths().sum() == len(expected)
    size = (tmp_path / "a.jsonl").stat().st_size
    assert heard[-1][:2] == (size, size)
    assert [done for done, _, _ in heard] == sorted(done for done, _, _ in heard)
    assert stream.shards.dtype == np.dtype("<u2")


def test_finished_shards_are_found_again(small_tokenizer, library_text, tmp_path, monkeypatch):
    write_documents(tmp_path / "a.jsonl", library_text, 0.05)
    data = config(tmp_path / "a.jsonl", tmp_path / "cache")
    first = prepare(data, small_tokenizer)
    monkeypatch.setattr(workers, "write_shard", lambda *a: pytest.fail("tokenized again"))
    assert prepare(data, small_tokenizer, verify=True).fingerprint == first.fingerprint
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")  # another name is another source
    with pytest.raises(pytest.fail.Exception, match="tokenized again"):
        prepare(config(tmp_path / "b.jsonl", tmp_path / "cache"), small_tokenizer)


def test_another_tokenizer_or_cut_is_another_set(small_tokenizer, library_text, tmp_path):
    (tmp_path / "a.txt").write_text(library_text)
    for separator in ("<|endoftext|>", "def "):
        source = SourceConfig(str(tmp_path / "a.txt"), separator=separator)
        prepare(DataConfig(sources=(source,), cache=str(tmp_path / "cache")), small_tokenizer)
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 2


@pytest.mark.slow
def test_processes_write_the_same_shards_as_one(small_tokenizer, library_text, tmp_path):
    write_documents(tmp_path / "a.jsonl", library_text, 3.5)
    prepare(config(tmp_path / "a.jsonl", tmp_path / "one"), small_tokenizer)
    prepare(config(tmp_path / "a.jsonl", tmp_path / "many", workers=3), small_tokenizer)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert len(contents(tmp_path / "one")) >= 9


@pytest.mark.slow
def test_killed_preparation_goes_on_after_its_last_whole_shard(small_tokenizer, library_text, tmp_path):
    small_tokenizer.save(tmp_path / "tokenizer")
    write_documents(tmp_path / "a.jsonl", library_text, 8)
    cache = tmp_path / "cache"
    process = start(tmp_path / "a.jsonl", cache, tmp_path / "tokenizer", 2)
    while len(list(cache.glob("*/shard-*.json"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # its workers end when their input does
    folder = folder_of(cache)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    assert 2 <= len(kept) < 8
    assert not (folder / "index.json").exists()
    (folder / f"shard-00007.bin{PART_MARK}99-dead").write_bytes(b"left by a killed worker")
    prepare(config(tmp_path / "a.jsonl", cache, workers=2), load_tokenizer(tmp_path / "tokenizer"))
    assert no_parts(cache)
    for name, changed in kept.items():
        assert (folder / name).stat().st_mtime_ns == changed
    prepare(config(tmp_path / "a.jsonl", tmp_path / "fresh", workers=2), small_tokenizer)
    assert contents(cache) == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_two_processes_at_once_make_one_set(small_tokenizer, library_text, tmp_path):
    small_tokenizer.save(tmp_path / "tokenizer")
    write_documents(tmp_path / "a.jsonl", library_text, 3)
    arguments = (tmp_path / "a.jsonl", tmp_path / "cache", tmp_path / "tokenizer", 2)
    processes = [start(*arguments), start(*arguments)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert no_parts(tmp_path / "cache")


@pytest.mark.parametrize("fault", ["cut bin", "no docs", "cut json", "altered"])
def test_damaged_shard_is_made_anew_and_the_others_stay(fault, small_tokenizer, library_text, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SMALLEST_SHARD", 20_000)
    write_documents(tmp_path / "a.jsonl", library_text, 0.1)
    data = config(tmp_path / "a.jsonl", tmp_path / "cache")
    first = prepare(data, small_tokenizer)
    before = contents(tmp_path / "cache")
    folder = folder_of(tmp_path / "cache")
    others = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*") if "00001" not in p.name}
    victim = folder / "shard-00001.bin"
    if fault == "cut bin":
        os.truncate(victim, victim.stat().st_size - 2)
    elif fault == "no docs":
        victim.with_suffix(".docs").unlink()
    elif fault == "cut json":
        os.truncate(victim.with_suffix(".json"), 20)
    else:
        content = bytearray(victim.read_bytes())
        content[10] ^= 1
        victim.write_bytes(content)
        assert prepare(data, small_tokenizer).fingerprint == first.fingerprint  # sizes alone do not show it
    assert prepare(data, small_tokenizer, verify=True).fingerprint == first.fingerprint
    assert contents(tmp_path / "cache") == before
    for name, changed in others.items():
        assert (folder / name).stat().st_mtime_ns == changed


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_named_and_leaves_nothing_half_written(workers, small_tokenizer, library_text, tmp_path):
    write_documents(tmp_path / "a.jsonl", library_text, 4)
    cache = tmp_path / "cache"
    cache.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(cache)]
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        data = config(tmp_path / "a.jsonl", cache, workers=workers)
        with pytest.raises(DataError, match=r"the disk of .* is full: free space, or set data\.cache"):
            prepare(data, small_tokenizer)
        assert no_parts(cache)
        folder = folder_of(cache)
        assert not (folder / "index.json").exists()
        kept = list(folder.glob("shard-*.json"))
        assert all(shards._whole(path.with_suffix(""), verify=True) for path in kept)
        subprocess.run(["mount", "-o", "remount,size=64m", str(cache)], check=True)
        corpus = prepare(data, small_tokenizer)
        fresh = prepare(config(tmp_path / "a.jsonl", tmp_path / "fresh"), small_tokenizer)
        assert corpus.fingerprint == fresh.fingerprint
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_bad_row_in_the_middle_keeps_what_is_whole(small_tokenizer, library_text, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SMALLEST_SHARD", 20_000)
    write_documents(tmp_path / "a.jsonl", library_text, 0.1)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{oops\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line \d+ is not JSON"):
        prepare(config(tmp_path / "a.jsonl", tmp_path / "cache"), small_tokenizer)
    assert len(list(folder_of(tmp_path / "cache").glob("shard-*.json"))) >= 3
    assert no_parts(tmp_path / "cache")


def change(path: Path) -> None:
    """Other text of the same size, and the same time of modification."""
    stat, content = path.stat(), path.read_bytes()
    time.sleep(0.02)  # a kernel's clock moves every few milliseconds
    path.write_bytes(content.replace(b"def", b"fed"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_nothing_is_kept_of_a_file_that_changes_while_it_is_tokenized(small_tokenizer, library_text, tmp_path, monkeypatch):
    """Its hash was taken before: its tokens would stand under the name of another text."""
    rows = write_documents(tmp_path / "a.jsonl", library_text, 0.05)
    before = (tmp_path / "a.jsonl").read_bytes()
    data = config(tmp_path / "a.jsonl", tmp_path / "cache", validation_fraction=0.0)

    def tokenize_then_change(*arguments):
        shard_files.write_shard(*arguments)
        change(tmp_path / "a.jsonl")

    monkeypatch.setattr(workers, "write_shard", tokenize_then_change)
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read: start again once nothing writes to it"):
        prepare(data, small_tokenizer)
    assert not [path for path in folder_of(tmp_path / "cache").iterdir() if path.name != "lock"]
    monkeypatch.undo()
    (tmp_path / "a.jsonl").write_bytes(before)
    (stream,) = prepare(data, small_tokenizer).train.streams
    assert stream.read(0, stream.tokens).tolist() == [i for row in rows for i in (1, *small_tokenizer.encode(row), 2)]


@pytest.mark.parametrize("touch", [lambda path: os.link(path, path.with_suffix(".link")), lambda path: path.chmod(0o640)],
                         ids=["link", "chmod"])  # fmt: skip
def test_a_new_link_or_permission_is_no_change(small_tokenizer, library_text, tmp_path, monkeypatch, touch):
    path = tmp_path / "a.jsonl"
    write_documents(path, library_text, 0.05)
    hashed = []

    def tokenize_then_touch(*arguments):
        shard_files.write_shard(*arguments)
        before = path.stat().st_ctime_ns
        time.sleep(0.02)  # a kernel's clock moves every few milliseconds
        touch(path)
        assert path.stat().st_ctime_ns != before
        monkeypatch.setattr(source_files, "file_hash", lambda path: hashed.append(path) or file_hash(path))

    monkeypatch.setattr(workers, "write_shard", tokenize_then_touch)
    assert prepare(config(path, tmp_path / "cache"), small_tokenizer).train.tokens
    assert hashed == [path]  # once, however often it is looked at


def test_a_file_cut_off_while_it_is_tokenized_is_said_to_change(small_tokenizer, library_text, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_SMALLEST_SHARD", 20_000)
    write_documents(tmp_path / "a.jsonl", library_text, 0.1)
    sent = []

    def tokenize_then_cut(*arguments):
        shard_files.write_shard(*arguments)
        sent.append(arguments)
        os.truncate(tmp_path / "a.jsonl", 60_000)

    monkeypatch.setattr(workers, "write_shard", tokenize_then_cut)
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        prepare(config(tmp_path / "a.jsonl", tmp_path / "cache"), small_tokenizer)
    assert len(sent) == 1
    assert not list(folder_of(tmp_path / "cache").glob("shard-*"))


def test_no_portion_is_made_of_a_file_that_changed(library_text, tmp_path, monkeypatch):
    """Not even for a moment: a process that is killed then would leave a whole shard of it."""
    monkeypatch.setattr(shards, "_SMALLEST_SHARD", 20_000)
    write_documents(tmp_path / "a.jsonl", library_text, 0.1)
    portions = shards._portions(open_source(SourceConfig(str(tmp_path / "a.jsonl"))))
    next(portions)
    change(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        next(portions)


def test_a_file_that_was_only_touched_is_not_tokenized_again(small_tokenizer, library_text, tmp_path, monkeypatch):
    write_documents(tmp_path / "a.jsonl", library_text, 0.05)
    data = config(tmp_path / "a.jsonl", tmp_path / "cache")
    first = prepare(data, small_tokenizer)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "copy")
    (tmp_path / "copy").rename(tmp_path / "a.jsonl")
    monkeypatch.setattr(workers, "write_shard", lambda *a: pytest.fail("tokenized again"))
    assert prepare(data, small_tokenizer).fingerprint == first.fingerprint


def test_dead_worker_is_reported(small_tokenizer, tmp_path):
    with Workers(small_tokenizer, "text", tmp_path, 1) as pool:
        pool.submit(tmp_path / "shard-00000", [b"some text"]).result()
        assert shards._whole(tmp_path / "shard-00000", verify=True).tokens > 3
        pool._processes[0].kill()
        with pytest.raises(DataError, match=r"a tokenizing process ended \(status -9\).*lower data\.workers"):
            pool.submit(tmp_path / "shard-00001", [b"more text"]).result()
    assert pool._processes[0].poll() is not None


def test_places_that_cannot_be_written_are_named(small_tokenizer, unprivileged_folder):
    (unprivileged_folder / "a.txt").write_text("some text to learn from\n" * 20)
    (unprivileged_folder / "file").touch()
    with pytest.raises(DataError, match=r"file is not a folder: set data\.cache to another place"):
        prepare(config(unprivileged_folder / "a.txt", unprivileged_folder / "file"), small_tokenizer)
    (unprivileged_folder / "closed").mkdir(mode=0o500)
    with pytest.raises(DataError, match=r"closed.* cannot be written \(Permission denied\): set data\.cache"):
        prepare(config(unprivileged_folder / "a.txt", unprivileged_folder / "closed/cache"), small_tokenizer)


def test_cache_folder_follows_recipe_then_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MM_CACHE", str(tmp_path))
    assert cache_folder(DataConfig()) == tmp_path / "data"
    assert cache_folder(DataConfig(cache="~/x")) == Path("~/x").expanduser()
    monkeypatch.delenv("MM_CACHE")
    assert cache_folder(DataConfig()) == Path("~/.cache/mm/data").expanduser()


def test_tokenizing_needs_no_torch():
    """Workers start in a fraction of a second because nothing on their way imports torch."""
    code = textwrap.dedent("""
        import sys
        import mmcore.data.workers, mmcore.data.shards, mmcore.data.corpus, mmcore.data.packing
        from mmcore.data import load_tokenizer, prepare, Samples
        print("torch" in sys.modules)
    """)
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"

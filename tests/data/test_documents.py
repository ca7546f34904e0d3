"""What each kind of source yields, and the sentence for each way a source can be wrong."""

import gzip
import hashlib
import importlib
import json
import os
import time

import pytest

from mmcore.config import SourceConfig
from mmcore.data import documents
from mmcore.data.documents import HashBook, open_source, source_hash
from mmcore.errors import DataError
from tests.helpers.real_data import DATA, needs_data


def texts(path, kind="text", **keys) -> list[str]:
    return [document.text for document in open_source(SourceConfig(str(path), **keys), kind).documents()]


def test_text_file_is_one_document_kept_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"  one\r\ntwo\n\n")
    assert texts(tmp_path / "a.txt") == ["  one\r\ntwo\n\n"]


def test_text_file_is_cut_at_separators(tmp_path, monkeypatch):
    content = "first\n<|endoftext|>\nsecond\n\nhalf\n<|endoftext|>\n<|endoftext|>third 日"
    (tmp_path / "a.txt").write_text(content)
    expected = ["first", "second\n\nhalf", "", "third 日"]
    for block in (1, 2, 5, 7, 1000):  # a separator and a character may lie across two blocks
        monkeypatch.setattr(documents, "_BLOCK", block)
        assert texts(tmp_path / "a.txt") == expected
    assert texts(tmp_path / "a.txt", separator=None) == [content]
    assert texts(tmp_path / "a.txt", separator="|no|") == [content]


@needs_data("lmtext/tinystories")
def test_tinystories_is_cut_like_a_plain_split():
    path = DATA / "lmtext/tinystories/tinystories_b_2MiB.txt"
    parts = [part.strip("\r\n") for part in path.read_text("utf-8").split("<|endoftext|>")]
    assert texts(path) == parts
    assert len(parts) == 2317
    source = open_source(SourceConfig(str(path)))
    positions = [document.position for document in source.documents()]
    assert positions == sorted(positions)
    assert positions[-1] == source.total_bytes


@needs_data("lmtext/stories")
def test_jsonl_rows_plain_and_compressed(tmp_path):
    path = DATA / "lmtext/stories/african_storybook_en.jsonl"
    expected = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines() if line]
    assert texts(path) == expected
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert texts(tmp_path / "b.jsonl.gz") == expected
    zstandard = pytest.importorskip("zstandard")
    half = path.read_bytes()
    cut = half.index(b"\n", len(half) // 2) + 1
    frames = zstandard.compress(half[:cut]) + zstandard.compress(half[cut:])  # two frames, as parallel writers make
    (tmp_path / "b.jsonl.zst").write_bytes(frames)
    assert texts(tmp_path / "b.jsonl.zst") == expected
    assert texts(path, text_key="title")[0] == "A very tall man"


def test_parquet_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    rows = [f"text {n} 日" for n in range(3000)]
    parquet.write_table(pyarrow.table({"text": rows, "other": list(range(3000))}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == rows
    with pytest.raises(DataError, match=r"a\.parquet has no column 'body'; it has 'text', 'other': name one of these as text_key"):
        texts(tmp_path / "a.parquet", text_key="body")
    parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "talk.parquet")
    with pytest.raises(DataError, match="it has 'messages': set data.kind to conversations"):
        texts(tmp_path / "talk.parquet")
    with pytest.raises(DataError, match="row 1: 'other' holds int, not text"):
        texts(tmp_path / "a.parquet", text_key="other")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"a\.parquet is no whole parquet file"):
        texts(tmp_path / "a.parquet")


def test_folder_is_read_in_order_and_other_files_are_counted(tmp_path):
    (tmp_path / "b/deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for name in ("b/z.txt", "b/deep/y.md", "a.py", "c.rst", ".hidden/h.txt", ".dot.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.jsonl").write_text('{"text": "d"}\n\n{"text": "e"}\n')
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "Makefile").write_text("x")
    source = open_source(SourceConfig(str(tmp_path)))
    assert [d.text for d in source.documents()] == ["a.py", "b/deep/y.md", "b/z.txt", "c.rst", "d", "e"]
    assert source.skipped == {".png": 1, "Makefile": 1, ".txt": 1}


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    """Real folders before links to them; one that lies elsewhere is read by the link's name."""
    for name in ("set/a/one.txt", "set/a/deep/two.txt", "elsewhere/three.txt", "elsewhere/b/four.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "set/a/circle").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/0").symlink_to(tmp_path / "set/a/deep")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/again").symlink_to(tmp_path / "elsewhere/b")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere/self").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/gone").symlink_to(tmp_path / "nowhere")
    source = open_source(SourceConfig(str(tmp_path / "set")))
    assert [file.name for file in source.files] == ["a/deep/two.txt", "a/one.txt", "again/four.txt", "linked/three.txt"]
    assert source.skipped == {"gone": 1}


def test_only_of_pythons_library_some_folders_are_left_out(tmp_path):
    for name in ("config-a", "test", "plain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    assert texts(tmp_path) == ["config-a", "plain", "test"]


def test_python_library_is_there_and_has_no_tests():
    source = open_source(SourceConfig("python-library"))
    found = [document.text for document in source.documents()]
    size = sum(len(text.encode()) for text in found)
    assert 8e6 < size < 25e6
    names = [file.name for file in source.files]
    assert "argparse.py" in names and "asyncio/events.py" in names
    assert not [name for name in names if "site-packages" in name or "/test" in name or name.startswith("test")]
    assert any("The \"if\" statement" in text and not text.startswith("#") for text in found)  # a help topic
    again = open_source(SourceConfig("python-library"))
    assert [file.name for file in again.files] == names


def test_faulty_sources_are_named(tmp_path):
    cases = {
        "none": (tmp_path / "none.txt", r"there is no file or folder .*none\.txt: check the path"),
        "empty": (tmp_path / "empty.txt", r"empty\.txt is empty: give a source"),
        "unknown": (tmp_path / "x.docx", r"x\.docx is of an unknown sort: rename or convert"),
        "binary": (tmp_path / "binary.txt", r"binary\.txt is binary \(a zero byte at byte 3\)"),
        "latin": (tmp_path / "latin.txt", r"latin\.txt is not UTF-8 at byte 19: convert it"),
        "broken": (tmp_path / "broken.jsonl", r"broken\.jsonl, line 3 is not JSON \(.*\): correct or remove"),
        "talk": (tmp_path / "talk.jsonl", r"it has 'messages': set data.kind to conversations to train on them \(mm eval"),
        "chat keyless": (tmp_path / "keyless.jsonl", r'line 1 has no field "?.messages.*it has .text.: write rows such as {"messages": \[{"role"'),
        "chat list": (tmp_path / "list.jsonl", r'no JSON object: write rows such as {"messages": \[{"role"'),
        "keyless": (tmp_path / "keyless.jsonl", r"line 2 has no field 'text'; it has 'body', 'id': name one of these as text_key"),
        "list": (tmp_path / "list.jsonl", r"list\.jsonl, line 1 is no JSON object"),
        "number": (tmp_path / "number.jsonl", r"number\.jsonl, line 1: 'text' holds int, not text"),
        "half": (tmp_path / "half.jsonl", r"half\.jsonl, line 1 holds half of a surrogate pair"),
        "encoded": (tmp_path / "encoded.jsonl", r"encoded\.jsonl, line 2 is not UTF-8 at byte 10 of the line"),
        "cut": (tmp_path / "cut.jsonl.gz", r"cut\.jsonl\.gz is damaged after line \d+"),
        "fake": (tmp_path / "fake.jsonl.gz", r"fake\.jsonl\.gz is damaged after line 0"),
        "folder": (tmp_path / "folder", r"folder holds no text: it needs \.txt"),
        "chat": (tmp_path / "latin.txt", r"latin\.txt holds no conversations: give"),
        "chat csv": (tmp_path / "x.csv", r"x\.csv is of an unknown sort: rename or convert it to one of \.jsonl \.jsonl\.gz"),
    }
    (tmp_path / "empty.txt").touch()
    (tmp_path / "x.docx").write_text("x")
    (tmp_path / "x.csv").write_text("x")
    (tmp_path / "binary.txt").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes(b"ok <|endoftext|> ok\xe9")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    (tmp_path / "talk.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "keyless.jsonl").write_text('{"text": "a"}\n{"body": "b", "id": 1}\n')
    (tmp_path / "list.jsonl").write_text('["a"]\n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d"}\n')
    (tmp_path / "encoded.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abcdefgh"}\n' * 1000)[:-20])
    (tmp_path / "fake.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/image.png").touch()
    for name, (path, message) in cases.items():
        with pytest.raises(DataError, match=message):
            texts(path, kind="conversations" if name.startswith("chat") else "text")
    with pytest.raises(DataError, match="'messages' holds list, not text: set data.kind to conversations"):
        texts(tmp_path / "talk.jsonl", text_key="messages")


def test_unreadable_file_is_named(unprivileged_folder):
    (unprivileged_folder / "a.txt").write_text("x")
    (unprivileged_folder / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"a\.txt cannot be read \(Permission denied\)"):
        texts(unprivileged_folder / "a.txt")
    (unprivileged_folder / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match=r"closed cannot be read \(Permission denied\)"):
        texts(unprivileged_folder / "closed")


@pytest.mark.parametrize(("path", "library", "extra"), [
    ("hf:some/name", "datasets", "datasets"), ("a.parquet", "pyarrow", "parquet"), ("a.jsonl.zst", "zstandard", "zstd"),
])
def test_missing_library_is_named_with_its_extra(path, library, extra, tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_text("x")
    (tmp_path / "a.jsonl.zst").write_text("x")
    imported = importlib.import_module

    def without(name, *arguments):
        if name == library:
            raise ImportError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    where = path if path.startswith("hf:") else tmp_path / path
    with pytest.raises(DataError, match=rf"needs the library {library}: pip install 'mm\[{extra}\]'"):
        texts(where)


def test_hugging_face_dataset_from_a_folder(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts(f"hf:{tmp_path}") == ["a", "b"]
    with pytest.raises(DataError, match="cannot be loaded .*: check its name and split"):
        texts(f"hf:{tmp_path}:nothing")


def test_hash_follows_content_and_is_remembered(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, ns=(10**18, 10**18))
    book = HashBook(tmp_path / "hashes.json")
    first = source_hash(open_source(SourceConfig(str(file))), book)
    book.write(2 * 10**18)
    read = []
    monkeypatch.setattr(documents.hashlib, "file_digest", lambda *a: read.append(a))
    again = HashBook(tmp_path / "hashes.json")
    assert source_hash(open_source(SourceConfig(str(file))), again) == first
    assert not read
    monkeypatch.undo()
    file.write_text("two")
    assert source_hash(open_source(SourceConfig(str(file))), HashBook(tmp_path / "hashes.json")) != first


def test_hash_follows_a_change_that_keeps_size_and_time(tmp_path):
    """As of a program that edits in place and sets the time back, or of a restored copy."""
    file, book = tmp_path / "a.txt", tmp_path / "hashes.json"
    file.write_text("one")
    os.utime(file, ns=(10**18, 10**18))
    first = HashBook(book)
    digest = first.sha256(file)
    first.write(2 * 10**18)
    time.sleep(0.02)  # a kernel's clock moves every few milliseconds
    file.write_text("two")
    os.utime(file, ns=(10**18, 10**18))
    assert HashBook(book).sha256(file) == hashlib.sha256(b"two").hexdigest() != digest
    file.write_text("one")
    os.utime(file, ns=(10**18, 10**18))
    assert HashBook(book).sha256(file) == digest


@pytest.mark.parametrize("times", [["mtime_ns", "ino"], ["mtime_ns", "ctime_ns", "ino"]], ids=len)
def test_a_book_of_before_costs_hashing_again(tmp_path, times):
    file, book = tmp_path / "a.txt", tmp_path / "hashes.json"
    file.write_text("one")
    stat = file.stat()
    entry = [stat.st_size, *(getattr(stat, "st_" + name) for name in times), "an earlier hash"]
    book.write_text(json.dumps({str(file.resolve()): entry, "x": 3}))
    known = HashBook(book)
    assert known.sha256(file) == hashlib.sha256(b"one").hexdigest()
    known.write(stat.st_ctime_ns + 10**10)
    assert [len(entry) for entry in json.loads(book.read_text()).values()] == [4]


def test_hash_of_a_file_just_changed_is_not_remembered(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    book = HashBook(tmp_path / "hashes.json")
    book.sha256(file)
    book.write(file.stat().st_mtime_ns + 10**9)
    assert json.loads((tmp_path / "hashes.json").read_text()) == {}
    (tmp_path / "hashes.json").write_text("{damaged")
    assert HashBook(tmp_path / "hashes.json").sha256(file) == book.sha256(file)

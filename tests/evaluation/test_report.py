"""The result folder: whole or absent, and readable."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from mmcore.errors import ConfigError, HardwareError
from mmcore.evaluation import folders
from mmcore.evaluation import report as reports


def result(name, loss=2.0, trained=32, error=0.01, without=()):
    bins = [
        {"first": first, "last": last, "loss": loss / first**0.1, "standard_error": error, "count": last - first + 1}
        for first, last in ((1, 1), (2, 4), (5, 32), (33, 256))
    ]
    return {
        "checkpoint": name, "model_type": "memory_mosaics_v2", "parameters": 10, "without": list(without),
        "trained_context": trained, "loss": loss, "standard_error": error, "perplexity": 7.389, "bits_per_byte": 1.5,
        "tokens": 1000, "documents": 3, "bytes": 4000, "context": 32, "stride": 16,
        "by_position": {"longest": 256, "sequences": 2, "concatenated": False, "loss": 1.5, "tokens": 256, "bins": bins},
    }


def report(*results, **more):
    text = {"name": "a book", "documents": 3, "bytes": 4000}
    return {"text": text, "results": list(results), "notes": ["nothing to add"], **more}


def test_files(tmp_path):
    folder = tmp_path / "out"
    written = reports.write_results(report(result("runs/a"), compressors={"gzip -9": 2.5}), folder)
    assert sorted(path.name for path in written) == ["by-position.png", "by-position.svg", "results.json", "results.md"]
    assert json.loads((folder / "results.json").read_text())["results"][0]["loss"] == 2.0
    page = (folder / "results.md").read_text()
    assert "| a | 2.0000 ± 0.0100 | 7.39 | 1.5000 |" in page and "| gzip -9 | - | - | 2.5000 | - |" in page and "without" not in page
    assert "nothing to add" in page and "8" in page
    with Image.open(folder / "by-position.png") as image:
        assert image.width > 1000
    assert os.listdir(tmp_path) == ["out"]


def test_equal_results_give_equal_files(tmp_path):
    for name in ("one", "two"):
        reports.write_results(report(result("runs/a")), tmp_path / name)
    for name in ("results.json", "results.md", "by-position.png", "by-position.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_earlier_results_are_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "out"
    reports.write_results(report(result("runs/a")), folder)
    without_positions = result("runs/b")
    without_positions["by_position"] = None
    reports.write_results(report(without_positions), folder)
    assert sorted(os.listdir(folder)) == ["results.json", "results.md"]
    assert os.listdir(tmp_path) == ["out"]


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="other things than an earlier report"):
        reports.check_folder(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("others", [
    {"results.json": '{"mine": 1}'}, {"results.json": "no JSON"}, {"results.json": '{"mine": 1}', "code.py": "x"},
    {"results.json": json.dumps(report(result("runs/a"))), "thesis.tex": "years"},
    {"results.json": json.dumps(report(result("runs/a"))), "items.jsonl": "{}", "report.html": "of suites"},
])  # fmt: skip
def test_files_of_others_are_left_alone(tmp_path, others):
    """Also beside results, and where they are called as ours are."""
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="other things than an earlier report"):
        reports.write_results(report(result("runs/b")), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == others


def test_the_working_folder_and_a_link(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    reports.write_results(report(result("runs/a")), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "results.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    reports.write_results(report(result("runs/a")), ".")
    assert sorted(os.listdir(tmp_path)) == ["empty", "here", "link"]
    assert "results.json" in os.listdir(tmp_path / "here")


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    for _ in range(2):
        (tmp_path / "out" / ".draft-abc").mkdir(parents=True, exist_ok=True)
        reports.write_results(report(result("runs/a")), tmp_path / "out")
    assert (tmp_path / "out" / "results.json").is_file()


def test_two_results_of_one_second(tmp_path):
    """Both asked for a folder before either had written."""
    wanted = [folders.default_folder(tmp_path) for _ in range(2)]
    for folder, name in zip(wanted, "ab", strict=True):
        reports.write_results(report(result(f"runs/{name}")), folders.claim(folder))
    found = [json.loads((folder / "results.json").read_text())["results"][0]["checkpoint"] for folder in tmp_path.iterdir()]
    assert sorted(found) == ["runs/a", "runs/b"]


def test_unequal_windows_are_said():
    one, other = result("runs/a"), result("runs/b") | {"context": 64, "stride": 32}
    (alike,) = {*reports.policy(report(one, one))[:1]}
    assert alike.startswith("Every token is scored once, in windows of 32 tokens that advance by 16:")
    said = reports.policy(report(one, other))
    assert said[0].startswith("a: ") and "windows of 32 tokens" in said[0]
    assert said[1].startswith("b: ") and "windows of 64 tokens" in said[1] and "--context 32" in said[2]


def test_nothing_half_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reports, "plot", full)
    with pytest.raises(HardwareError, match="No space left on device"):
        reports.write_results(report(result("runs/a")), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_several_checkpoints_side_by_side():
    both = report(result("runs/a/final"), result("runs/b/final", 2.5, trained=64, error=None))
    assert reports.names(both) == ["a/final", "b/final"]
    header, rows = reports.position_rows(both)
    assert header[2:] == ["a/final", "b/final"] and len(rows) == 4
    assert rows[0][1] == "-" and rows[0][2] == "2.0000 ± 0.0100" and rows[0][3] == "2.5000"
    header, rows = reports.summary_rows(both)
    assert len(rows) == 2 and all(len(row) == len(header) for row in rows)


def test_removed_memories_are_named():
    both = report(result("runs/a"), result("runs/b", without=["long_term"]), compressors={"gzip -9": 2.5})
    header, rows = reports.summary_rows(both)
    assert header[-1] == "without" and [row[-1] for row in rows] == ["-", "long_term", "-"]


def test_the_same_checkpoint_twice():
    assert reports.names(report(result("runs/a"), result("runs/a"))) == ["a", "a"]


def test_default_folder_is_in_the_run(tmp_path):
    for given, parent in (("run", "run"), ("run/checkpoints/step-000010", "run"), ("exported", "exported")):
        (tmp_path / given).mkdir(parents=True, exist_ok=True)
        assert folders.default_folder(tmp_path / given).parent == tmp_path / parent
    model = tmp_path / "model.bin"
    model.touch()
    assert folders.default_folder(model).parent == Path(), "others' data lie beside a file"


def test_numbers_beyond_floats_are_null_in_json(tmp_path):
    """Python would write Infinity, which no other reader takes."""
    endless = report(result("runs/a") | {"perplexity": float("inf"), "loss": 900.0})
    reports.write_results(endless, tmp_path / "out")

    def refuse(word):
        raise AssertionError(word)

    read = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse)
    assert read["results"][0]["perplexity"] is None and read["results"][0]["loss"] == 900.0
    assert "inf" in (tmp_path / "out" / "results.md").read_text()

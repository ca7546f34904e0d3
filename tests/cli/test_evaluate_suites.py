"""`mm eval --suite` and `mm eval --inspect` as a user runs them, on small exported models."""

import base64
import json
import os
import re
from html.parser import HTMLParser

import pytest
import torch

import mmcore
from mmcli.app import run
from mmcore.data import train_sentencepiece
from mmcore.evaluation import harness
from mmcore.evaluation.reading import ModelReader
from mmcore.evaluation.suite_tables import tables
from tests.cli.test_evaluate import DOCUMENTS, export, tiny

NAMES = ["ann", "bob", "cid", "dora", "eve", "fay", "gus", "hal"]


def write_data(folder):
    """A data folder as the suites look for it: SQuAD, a book, FewRel, a user's CSV, a benchmark."""
    folder.mkdir()
    paragraphs = [{"context": f"{name} keeps the number {n} in a box of wood.",
                   "qas": [{"question": f"Which number does {name} keep?", "answers": [{"text": str(n), "answer_start": 0}], "id": name}]}
                  for n, name in enumerate(NAMES)]
    (folder / "dev-v2.0.json").write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    (folder / "books").mkdir()
    (folder / "books" / "one.txt").write_text(". ".join(DOCUMENTS))
    labels = "text,label\n" + "".join(f"{word} {n} {word},{label}\n" for n in range(8) for word, label in
                                      (("fox", "red"), ("dog", "red fox"), ("cat", "grey")))
    (folder / "mine.csv").write_text(labels)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"q": f"{name} is a", "c": ["fox", "dog"], "g": n % 2})
                                                 for n, name in enumerate(NAMES)))
    (folder / "own.yaml").write_text("task: own\ndata: rows.jsonl\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
                                     "doc_to_choice: '{{c}}'\ndoc_to_target: '{{g}}'\n")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two exported models and data."""
    folder = tmp_path_factory.mktemp("suites")
    tokenizer = train_sentencepiece(DOCUMENTS, 300)
    export(tiny(), folder / "mosaic", tokenizer)
    export(tiny("llama"), folder / "llama", tokenizer)
    write_data(folder / "data")
    return folder


@pytest.fixture
def place(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


SMALL = ["--data", "data", "--data", "data/mine.csv", "--limit", "2", "--tasks", "qa_1,niah_single_2,mine",
         "--lengths", "2k", "--shots", "0,1"]


def complaint(capsys, *arguments):
    """The one line that a mistake is answered with."""
    assert run(["eval", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("mm: ") and captured.err.count("\n") == 1
    return captured.err


class Page(HTMLParser):
    """The tables of a page as lists of cells, and everything it points to."""

    def __init__(self):
        super().__init__()
        self.tables, self.links, self.tags, self._cell = [], [], set(), None

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data


@pytest.fixture(scope="module")
def measured(home):
    """One evaluation of both models, and the same again."""
    before = os.getcwd()
    os.chdir(home)
    try:
        arguments = ["eval", "mosaic", "llama", "--suite", "new-knowledge", "--suite", "in-context", *SMALL,
                     "--without", "long_term", "--out", "out"]
        assert run(arguments) == 0
        first = json.loads((home / "out" / "results.json").read_text())
        lines = (home / "out" / "items.jsonl").read_text()
        assert run(arguments) == 0
        assert (home / "out" / "items.jsonl").read_text() == lines, "nothing is measured twice"
        return first, json.loads((home / "out" / "results.json").read_text())
    finally:
        os.chdir(before)


def test_the_result_folder(home, measured):
    first, again = measured
    assert first["results"] == again["results"] and first["items_found"] == 0 < again["items_found"]
    assert sorted(os.listdir(home / "out")) == [
        "in-context-by-shots.png", "in-context-by-shots.svg", "items.jsonl", "new-knowledge-by-depth.png",
        "new-knowledge-by-depth.svg", "new-knowledge-by-length.png", "new-knowledge-by-length.svg", "report.html",
        "results.json", "results.md"]
    variants = [(result["checkpoint"], result["variant"]) for result in first["results"]]
    assert variants == [("mosaic", "whole"), ("mosaic", "without long_term"), ("llama", "whole")]
    assert "llama has no long_term: it is measured whole only" in first["notes"]
    assert any("was trained for 32 tokens: lengths from 2,048 on lie beyond" in note for note in first["notes"])
    assert any("the label 'red' is the beginning of 'red fox'" in note for note in first["notes"])
    assert set(first["data"]) == {"qa_1", "essay", "mine"}
    assert all(re.fullmatch("[0-9a-f]{64}", source["sha256"]) for source in first["data"].values())
    assert len({result["sha256"] for result in first["results"]}) == 2 and set(first["versions"]) >= {"mm", "torch"}
    items = [json.loads(line) for line in (home / "out" / "items.jsonl").read_text().splitlines()]
    # three variants, two items: two tasks at a length; two kinds of labels in two forms without a shot, four with one
    assert len(items) == 3 * 2 * (2 + 2 * (2 + 4)) == len({item["key"] for item in items})
    assert all(item["prompt_sha256"] and item["answers"] for item in items if item["suite"] == "new-knowledge")


def test_figures_are_means_of_the_items(home, measured):
    items = [json.loads(line) for line in (home / "out" / "items.jsonl").read_text().splitlines()]
    for result in measured[0]["results"]:
        mine = [item for item in items if (item["model"]["checkpoint"], item["model"]["without"]) == (result["sha256"], result["without"])]
        for row in result["new_knowledge"]:
            scores = [item["score"] for item in mine if item.get("task") == row["task"] and item.get("length") == row["length"]]
            assert row["score"] == 100 * sum(scores) / 2 and row["items"] == 2
        for row in result["in_context"]:
            for form in row["forms"]:
                scores = [item["score"] for item in mine if (item.get("labels"), item.get("shots"), item.get("form")) ==
                          (row["labels"], row["shots"], form["form"])]
                assert len(scores) == 2 and form["score"] == 100 * sum(scores) / 2
            assert row["best"]["score"] == max(form["score"] for form in row["forms"])


def test_the_page_stands_alone_and_says_what_the_json_says(home, measured):
    text = (home / "out" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base"} and "@import" not in text and "url(" not in text
    for link in page.links:
        assert link.startswith(("#", "data:image/svg+xml;base64,")), link[:60]
        if link.startswith("data:"):
            assert b"<svg" in base64.b64decode(link.partition(",")[2])
    cells = {row[0]: row[1:] for table in page.tables for row in table if table[0][:2] == ["model", "2,048"] and "[" in str(table)}
    assert cells
    # read from the JSON anew, not through the tables
    page_tables = [table for table in page.tables if table[0] == ["model", "2,048"]]
    for task in ("qa_1", "niah_single_2"):
        wanted = []
        for result in measured[0]["results"]:
            row = next(row for row in result["new_knowledge"] if row["task"] == task)
            wanted.append(f"{row['score']:.1f} [{row['interval'][0]:.1f}, {row['interval'][1]:.1f}]")
        assert any([row[1] for row in table[1:]] == wanted for table in page_tables), task
    for kind in ("semantic", "anonymous"):
        for key, interval in (("mean", "mean_interval"), ("best", None)):
            wanted = []
            for result in measured[0]["results"]:
                rows = sorted((row for row in result["in_context"] if row["labels"] == kind), key=lambda row: row["shots"])
                scores = [(row[key], row[interval]) if interval else (row[key]["score"], row[key]["interval"]) for row in rows]
                wanted.append([f"{score:.1f} [{low:.1f}, {high:.1f}]" for score, (low, high) in scores])
            assert any([row[1:] for row in table[1:]] == wanted for table in page.tables if table[0] == ["model", "0 shots", "1 shot"])
    markdown = (home / "out" / "results.md").read_text()
    for table in tables(measured[0]):
        assert f"### {table.title}" in markdown and f"<h3>{table.title}</h3>" in text


def test_words_from_files_cannot_become_markup(place, capsys, tmp_path):
    (tmp_path / "evil.csv").write_text("text,label\n" + "".join(f"<script>x{n}</script>,<b>{label}</b>\n" for n in range(8) for label in "pq"))
    assert run(["eval", "mosaic", "--suite", "in-context", "--data", str(tmp_path / "evil.csv"), "--tasks", "evil", "--limit", "1",
                "--shots", "1", "--out", str(tmp_path / "out")]) == 0
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert not page.tags & {"script", "b"}


@pytest.mark.skipif(harness._TemplateLM is None, reason="lm_eval is missing: pip install 'mm[harness]'")
def test_persistent_suite_with_an_own_task(place, capsys, tmp_path):
    assert run(["eval", "mosaic", "llama", "--suite", "persistent", "--data", "data/own.yaml", "--without", "long_term", "--limit", "4",
                "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "Own benchmarks" in text and "without long_term" in text
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    for result in report["results"]:
        (row,) = result["persistent"]
        assert row["task"] == "own" and row["items"] == 4 and row["score"] in (0, 25, 50, 75, 100)


def test_a_removed_memory_equals_zeroed_columns_of_the_output_matrix(place):
    """W_o's last d columns read the long-term heads."""
    tokenizer = mmcore.load_tokenizer("mosaic")
    prompt, endings = " ".join(DOCUMENTS[:3]), [" fox", " dog", " the lazy"]
    removed = ModelReader(mmcore.load_model("mosaic", without=("long_term",)), tokenizer)
    model = mmcore.load_model("mosaic")
    whole = ModelReader(model, tokenizer).choose(prompt, endings)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.out_proj.weight[:, model.config.hidden_size:] = 0
    zeroed = ModelReader(model, tokenizer)
    assert removed.choose(prompt, endings) == pytest.approx(zeroed.choose(prompt, endings), rel=1e-6)
    assert removed.choose(prompt, endings) != pytest.approx(whole, rel=1e-6)
    assert removed.complete(prompt, 8) == zeroed.complete(prompt, 8)


def test_an_interrupted_evaluation_goes_on(place, capsys, tmp_path, monkeypatch):
    arguments = ["eval", "mosaic", "--suite", "in-context", "--data", "data/mine.csv", "--tasks", "mine", "--limit", "3", "--shots", "1"]
    choose, asked = ModelReader.choose, []

    def interrupted(self, prompt, endings):
        asked.append(prompt)
        if len(asked) == 10:
            raise KeyboardInterrupt
        return choose(self, prompt, endings)

    monkeypatch.setattr(ModelReader, "choose", interrupted)
    assert run(arguments) == 130
    assert "goes on" in capsys.readouterr().err
    (folder,) = (place / "mosaic").glob("eval-suite-*")
    assert len((folder / "items.jsonl").read_text().splitlines()) == 9 and not (folder / "results.json").exists()
    assert run([*arguments, "--json"]) == 0  # the same command finds the same folder
    report = json.loads(capsys.readouterr().out)
    assert report["items_found"] == 9 and report["folder"] == str(folder.relative_to(place))
    assert len(asked) == 10 + 2 * 4 * 3 - 9
    monkeypatch.undo()


def test_mistakes_are_answered_with_one_line(place, capsys, tmp_path):
    base = ["mosaic", "--data", "data"]
    assert "there is no suite 'old-knowledge': choose from persistent" in complaint(capsys, *base, "--suite", "old-knowledge")
    assert "there is no task 'qa_9'" in complaint(capsys, *base, "--suite", "all", "--tasks", "qa_9")
    line = complaint(capsys, *base, "--suite", "in-context")
    assert "banking77 needs a folder banking77 with train.csv" in line and "goemotions needs" in line and "https://" in line
    assert "qa_2 needs hotpot_dev_distractor_v1.json" in complaint(capsys, *base, "--suite", "new-knowledge")
    assert "without --data DIR" in complaint(capsys, "mosaic", "--suite", "new-knowledge")
    assert "there is no file or folder nowhere" in complaint(capsys, "mosaic", "--suite", "in-context", "--data", "nowhere")
    assert "no checkpoint has a memory 'episodic'" in complaint(
        capsys, *base, "--suite", "new-knowledge", "--tasks", "qa_1", "--without", "episodic")
    assert "--lengths has '4q'" in complaint(capsys, *base, "--suite", "new-knowledge", "--lengths", "4q")
    assert "--shots has 'x'" in complaint(capsys, *base, "--suite", "in-context", "--shots", "x")
    assert "--limit is -1" in complaint(capsys, *base, "--suite", "in-context", "--limit", "-1")
    mine = ["mosaic", "--data", "data/mine.csv", "--suite", "in-context", "--tasks", "mine"]
    assert "ask for at most so many --shots" in complaint(capsys, *mine, "--shots", "64")
    assert "holds no earlier results of suites" in complaint(capsys, *mine, "--out", "data")
    (tmp_path / "code.yaml").write_text("task: x\ndata: y\ndoc_to_text: !function a.b\n")
    assert "holds code" in complaint(capsys, "mosaic", "--suite", "persistent", "--data", tmp_path / "code.yaml")
    assert "fits into 256 tokens" in complaint(
        capsys, *base, "--suite", "new-knowledge", "--tasks", "qa_1", "--lengths", "256", "--out", tmp_path / "a")
    assert "never ends there" in complaint(
        capsys, *base, "--suite", "new-knowledge", "--tasks", "qa_1", "--lengths", "600", "--ruler-exact", "--out", tmp_path / "b")


def test_unequal_vocabularies_are_said(place, capsys, tmp_path):
    export(tiny(), tmp_path / "other", train_sentencepiece(DOCUMENTS[:9], 300))
    assert run(["eval", "mosaic", str(tmp_path / "other"), "--suite", "in-context", "--data", "data/mine.csv", "--tasks", "mine", "--limit", "1",
                "--shots", "1", "--out", str(tmp_path / "out"), "--json"]) == 0
    assert any("different tokenizers" in note for note in json.loads(capsys.readouterr().out)["notes"])


def test_inspection(place, capsys, tmp_path):
    (tmp_path / "text.txt").write_text(DOCUMENTS[2])
    assert run(["eval", "mosaic", "--inspect", str(tmp_path / "text.txt"), "--token", "20", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Token 20: ") and "layer 1, long-term" in text and "beta" in text
    values = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert len(values["reads"]) == 2 * 2 * 2 and values["token"] == 20
    for read in values["reads"]:
        assert sum(part["weight"] for part in read["by_distance"]) == pytest.approx(1, abs=1e-5)
        assert read["size"] == (7 if read["memory"] == "short_term" else 17)
        assert read["strongest"] == sorted(read["strongest"], key=lambda one: -one["weight"])
    assert (tmp_path / "out" / "inspection.png").exists() and (tmp_path / "out" / "inspection.svg").exists()
    assert "--token is 999" in complaint(capsys, "mosaic", "--inspect", tmp_path / "text.txt", "--token", "999")
    assert "cannot be read as text" in complaint(capsys, "mosaic", "--inspect", tmp_path / "gone.txt")
    assert "give it one" in complaint(capsys, "mosaic", "llama", "--inspect", tmp_path / "text.txt")


def test_progress_in_a_log():
    from mmcli.evaluate_suites import plain_progress

    lines = []

    class Log:
        def print(self, line):
            lines.append(line)

    progress = plain_progress(Log(), every=0.0)
    progress("mosaic: qa_1 at 4,096", 0.0, 100.0)
    progress("mosaic: qa_1 at 4,096", 25.0, 100.0)
    assert len(lines) == 1 and lines[0].startswith("mosaic: qa_1 at 4,096: 25% of all done, about ") and lines[0].endswith(" s left")


def test_tasks_choose_among_suites(place, capsys, tmp_path):
    """With --suite all, a suite none of whose tasks is asked for is left out."""
    assert run(["eval", "mosaic", "--suite", "all", "--data", "data/mine.csv", "--tasks", "mine", "--limit", "1", "--shots", "1",
                "--out", str(tmp_path / "out"), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert "in_context" in result and "new_knowledge" not in result and "persistent" not in result
    assert "none of the tasks mine belongs to new-knowledge" in complaint(
        capsys, "mosaic", "--suite", "new-knowledge", "--data", "data/mine.csv", "--tasks", "mine")

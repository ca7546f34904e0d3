"""`mm eval --suite` and `mm eval --inspect` as a user runs them, on small exported models."""

import base64
import html
import json
import os
import re
import shlex
from html.parser import HTMLParser

import pytest
import torch

import mmcore
from mmcli.app import run
from mmcore.data import train_sentencepiece
from mmcore.evaluation import harness, suite_report
from mmcore.evaluation.reading import ModelReader
from mmcore.evaluation.suite_tables import tables
from tests.cli.test_evaluate import DOCUMENTS, export, tiny

pytestmark = pytest.mark.slow

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
    """The tables of a page as lists of cells (one that spans rows is in each of them), and everything it points to."""

    def __init__(self):
        super().__init__()
        self.tables, self.links, self.ids, self.tags, self._cell, self._spans = [], [], set(), set(), None, {}

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.ids |= {value for name, value in attrs if name == "id"}
        if tag == "table":
            self.tables.append([])
            self._spans = {}
        elif tag == "tr":
            self.tables[-1].append([])
            self._from_above()
        elif tag in ("td", "th"):
            self._cell, self._span = "", int(dict(attrs).get("rowspan", 1))

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            row = self.tables[-1][-1]
            self._spans[len(row)] = (self._cell, self._span)
            row.append(self._cell)
            self._cell = None
            self._from_above()

    def _from_above(self):
        row = self.tables[-1][-1]
        while self._spans.get(len(row), ("", 0))[1] > 1:
            text, left = self._spans[len(row)]
            self._spans[len(row)] = (text, left - 1)
            row.append(text)

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
    lines = [json.loads(line) for line in (home / "out" / "items.jsonl").read_text().splitlines()]
    heads = {line["key"]: line for line in lines if "query" not in line and line["suite"] == "in-context"}
    items = [line for line in lines if line["key"] not in heads]
    # the beginnings of prompts are kept once for all models: without a shot alike for both kinds of labels, in two forms;
    # with one in four
    assert len(heads) == 2 + 2 * 4
    assert all(heads[item["head"]]["head"] for item in items if item["suite"] == "in-context")
    # three variants, two items: two tasks at a length; two kinds of labels in two forms without a shot, four with one
    assert len(items) == 3 * 2 * (2 + 2 * (2 + 4)) == len({item["key"] for item in items})
    assert all(item["prompt_sha256"] and item["answers"] for item in items if item["suite"] == "new-knowledge")


def test_figures_are_means_of_the_items(home, measured):
    items = [item for line in (home / "out" / "items.jsonl").read_text().splitlines() if "score" in (item := json.loads(line))]
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
        assert link.startswith("data:image/svg+xml;base64,") or link.removeprefix("#") in page.ids, link[:60]
        if link.startswith("data:"):
            assert b"<svg" in base64.b64decode(link.partition(",")[2])
    # read from the JSON anew, not through the tables
    results = measured[0]["results"]
    by_length = [[line[2] for line in table[1:]] for table in page.tables if table[0] == ["model", "trained at", "2,048"]]
    wanted = []
    for task in ("qa_1", "niah_single_2"):
        rows = [next(row for row in result["new_knowledge"] if row["task"] == task) for result in results]
        wanted.append([shown(row["score"], row["interval"]) for row in rows])
    assert by_length == wanted
    (by_shots,) = (table for table in page.tables if table[0] == ["labels", "model", "form", "0 shots", "1 shot"])
    names = ["mosaic", "mosaic without long_term", "llama"]
    wanted = []
    for kind in ("semantic", "anonymous"):
        for name, result in zip(names, results, strict=True):
            rows = sorted((row for row in result["in_context"] if row["labels"] == kind), key=lambda row: row["shots"])
            wanted.append([kind, name, "best", *(shown(row["best"]["score"], row["best"]["interval"]) for row in rows)])
            wanted.append([kind, name, "mean", *(shown(row["mean"], row["mean_interval"]) for row in rows)])
    assert by_shots[1:] == wanted
    (glance,) = (table for table in page.tables if table[0] == ["dimension", "measurement", "chance", *names])
    best = [next(row["best"]["score"] for row in result["in_context"] if (row["labels"], row["shots"]) == ("anonymous", 1))
            for result in results]
    assert glance[-1] == ["In-context learning", "anonymous labels, 1 shot 1 task", "33.3", *(f"{score:.1f}" for score in best)]
    markdown = (home / "out" / "results.md").read_text()
    for number, table in enumerate(tables(measured[0]), start=1):
        assert f"### {table.title}" in markdown and f"<b>Table {number}.</b> {table.title}</h3>" in text


def shown(score, interval):
    return f"{score:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def test_the_page_says_how_to_measure_it_again(home, measured, monkeypatch):
    monkeypatch.chdir(home)
    words = shlex.split(suite_report.command(measured[0]))
    assert words[:4] == ["mm", "eval", "mosaic", "llama"]
    page = html.unescape((home / "out" / "report.html").read_text())
    assert f"<pre>{suite_report.command(measured[0])}</pre>" in page
    before = (home / "out" / "items.jsonl").read_text()
    assert run([*words[1:], "--out", "out"]) == 0
    assert (home / "out" / "items.jsonl").read_text() == before
    assert json.loads((home / "out" / "results.json").read_text())["results"] == measured[0]["results"]


def test_words_from_files_cannot_become_markup(place, capsys, tmp_path):
    (tmp_path / "evil.csv").write_text("text,label\n" + "".join(f"<script>{label}{n}</script>,<u>{label}</u>\n" for n in range(8) for label in "pq"))
    assert run(["eval", "mosaic", "--suite", "in-context", "--data", str(tmp_path / "evil.csv"), "--tasks", "evil", "--limit", "1",
                "--shots", "1", "--out", str(tmp_path / "out")]) == 0
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert not page.tags & {"script", "u"}


@pytest.mark.skipif(harness._TemplateLM is None, reason="lm_eval is missing: pip install 'mm[harness]'")
def test_persistent_suite_with_an_own_task(place, capsys, tmp_path):
    assert run(["eval", "mosaic", "llama", "--suite", "persistent", "--data", "data/own.yaml", "--without", "long_term", "--limit", "4",
                "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "own benchmarks" in text and "mm chat mosaic" in text
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["variant"] for result in report["results"]] == ["whole", "without long_term", "whole"]
    for result in report["results"]:
        (row,) = result["persistent"]
        assert row["task"] == "own" and row["items"] == 4 and row["score"] in (0, 25, 50, 75, 100)
        assert row["interval"][0] <= row["score"] <= row["interval"][1]
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert {item["prompt"] for item in items} == {f"{name} is a" for name in NAMES[:4]}
    assert {(item["task"], item["ending"]) for item in items} == {("own", " fox"), ("own", " dog")}


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
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert sum("query" in item for item in items) == 9 and not (folder / "results.json").exists()
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
    assert text.startswith("Token 20 of ") and "\nlong-term " in text and "layer 1 head 1" in text and "beta" in text
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
    from mmcli.evaluate_console import plain_suite_progress

    lines = []

    class Log:
        def print(self, line):
            lines.append(line)

    progress = plain_suite_progress(Log(), every=0.0)
    progress("mosaic: qa_1 at 4,096", 0.0, 100.0)
    progress("mosaic: qa_1 at 4,096", 25.0, 100.0)
    assert len(lines) == 1 and lines[0].startswith("mosaic: qa_1 at 4,096: 25% of all done, about ") and lines[0].endswith(" s left")


def test_formats_of_weights(place, capsys, tmp_path):
    arguments = ["eval", "mosaic", "--suite", "in-context", "--data", "data/mine.csv", "--limit", "2", "--shots", "1", "--json",
                 "--out", str(tmp_path / "out")]
    reports = []
    for dtype in ((), ("--dtype", "int8")):
        assert run([*arguments, *dtype]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert [report["settings"]["dtype"] for report in reports] == ["float32", "int8"]
    assert [report["items_found"] for report in reports] == [0, 0]  # the 16 results that the second run found are of fp32
    items = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    logprobs = {(item["labels"], item["form"], item["query"], item["model"]["dtype"]): item["logprob_answer"] for item in items
                if "query" in item}
    for (*which, dtype), value in logprobs.items():
        if dtype == "float32":
            assert 0 < abs(logprobs[(*which, "int8")] / value - 1) < 0.01
    assert "choose float32, bfloat16" in complaint(capsys, *arguments[1:], "--dtype", "int4")


@pytest.mark.parametrize(("arguments", "what"), [
    (("--suite", "in-context", "--stride", "9"), "--stride is an option of text and has no effect with --suite"),
    (("--suite", "in-context", "--token", "3"), "--token is an option of --inspect and has no effect with --suite"),
    (("--inspect", "x", "--limit", "9"), "--limit is an option of suites and has no effect with --inspect"),
    (("--data", "x", "--shots", "1,2"), "--shots is an option of suites and has no effect with a measurement of text"),
    (("--data", "x", "--token", "-1"), "--token is an option of --inspect and has no effect with a measurement of text"),
])
def test_options_without_effect_are_refused(place, capsys, arguments, what):
    assert f"{what}: leave it out" in complaint(capsys, "mosaic", *arguments)


def test_tasks_choose_among_suites(place, capsys, tmp_path):
    """With --suite all, a suite none of whose tasks is asked for is left out."""
    assert run(["eval", "mosaic", "--suite", "all", "--data", "data/mine.csv", "--tasks", "mine", "--limit", "1", "--shots", "1",
                "--out", str(tmp_path / "out"), "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert "in_context" in result and "new_knowledge" not in result and "persistent" not in result
    assert "none of the tasks mine belongs to new-knowledge" in complaint(
        capsys, "mosaic", "--suite", "new-knowledge", "--data", "data/mine.csv", "--tasks", "mine")

"""A user's own task file: every row is checked before the work, and what the harness would fail on is said in a sentence."""

import json

import pytest

from mmcore.errors import DataError
from mmcore.evaluation import harness
from mmcore.evaluation.persistent import benchmarks, task_files, task_rows
from mmcore.evaluation.persistent.local import Items, read_rows
from mmcore.evaluation.persistent.rehearsal import rehearse
from tests.helpers.real_data import DATA, needs_data

needs_harness = pytest.mark.skipif(harness._TemplateLM is None, reason="lm_eval is missing: pip install 'mm[harness]'")

CAPITALS = {
    "task": "capitals", "data": "rows.jsonl", "output_type": "multiple_choice", "doc_to_text": "The capital of {{country}} is",
    "doc_to_choice": "{{cities}}", "doc_to_target": "{{answer}}",
}
GOOD = [{"country": "France", "cities": ["Paris", "Lyon"], "answer": 0}, {"country": "Italy", "cities": ["Rome", "Bari"], "answer": 1}]


def write(folder, rows, **settings):
    """A task file (JSON is YAML) and its items."""
    values = {key: value for key, value in (CAPITALS | settings).items() if value is not None}
    (folder / "task.yaml").write_text(json.dumps(values))
    lines = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
    (folder / values["data"]).write_text(lines)
    return folder / "task.yaml"


def bad(**changes):
    """Two good rows and one with changes, or without what is changed to ...."""
    row = {"country": "Spain", "cities": ["Madrid", "Vigo"], "answer": 0} | changes
    return [*GOOD, {key: value for key, value in row.items() if value is not ...}]


@pytest.mark.parametrize(("row", "complaint"), [
    ({"country": ...}, "the template doc_to_text fails .'country' is undefined"),
    ({"country": None}, "the template doc_to_text fails .a field of it is empty"),
    ({"answer": ...}, "the template doc_to_target fails"),
    ({"answer": None}, "the template doc_to_target fails"),
    ({"answer": 7}, "its answer is 7, which is none of its 2 choices: give a whole number from 0 to 1, or the text of one"),
    ({"answer": -1}, "its answer is '-1', which is none of its 2 choices"),
    ({"answer": "madrid"}, "its answer is 'madrid', which is none of its 2 choices"),
    ({"answer": ""}, "its answer is '', which is none"),
    ({"answer": [0]}, "its answer is a list, or that of the first row is"),
    ({"cities": []}, "it has no choices"),
    ({"cities": ["Madrid", ""]}, "one of its choices is empty"),
    ({"cities": ["Madrid", None]}, "one of its choices is None"),
    ({"cities": "Madrid, Vigo"}, "doc_to_choice gives 'Madrid, Vigo', which is no list of texts"),
])
def test_a_bad_row_is_named(tmp_path, row, complaint):
    with pytest.raises(DataError, match=f"^row 3 of .*rows.jsonl: {complaint}"):
        task_files.load(write(tmp_path, bad(**row)))


@pytest.mark.parametrize(("settings", "row", "complaint"), [
    ({"doc_to_target": "answer"}, {"answer": "0"}, "its answer is '0', which is none"),
    ({"doc_to_target": "answer"}, {"answer": None}, "it lacks 'answer', which is its doc_to_target"),
    ({"doc_to_target": "answer"}, {"answer": 1.0}, "its answer is 1.0, which is none"),
    ({"doc_to_text": "country"}, {"country": ...}, "it lacks 'country', which is its doc_to_text"),
    ({"doc_to_text": "country"}, {"country": 3}, "its question is a bare number"),
    ({"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "country"}, {"country": ""}, "its answer is empty"),
    ({"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "cities"}, {"cities": []}, "it has no answer"),
    ({"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "cities"}, {"cities": "Vigo"}, "its answer is a list, or"),
    ({"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "{{country}}"}, {"country": ""}, "its answer is empty"),
    ({"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": "cities"}, {}, "its answer is .*no text"),
])
def test_a_bad_row_of_another_kind(tmp_path, settings, row, complaint):
    with pytest.raises(DataError, match=f"^row . of .*rows.jsonl: {complaint}"):
        task_files.load(write(tmp_path, bad(**row), **settings))


@pytest.mark.parametrize(("lines", "complaint"), [
    ("country,answer\nFrance,Paris\nItaly\n", "row 3 of .*rows.csv has 1 fields, its header 2"),
    ("country,answer\nFrance,Paris\nItaly,Rome,Bari\n", "row 3 of .*rows.csv has 3 fields, its header 2"),
    ("country,answer\nFrance,Paris\nItaly,Rom\n", "row 3 of .*rows.csv: its answer is 'Rom'"),
    ("country,answer\nFrance," + "x" * 140_000 + "\n", "cannot be read as CSV .field larger"),
    ("country,answer\n", "holds no rows"),
])
def test_a_bad_csv(tmp_path, lines, complaint):
    path = write(tmp_path, lines, data="rows.csv", doc_to_choice=["Paris", "Rome"])
    with pytest.raises(DataError, match=complaint):
        task_files.load(path)


def test_a_csv_that_is_not_utf8(tmp_path):
    path = write(tmp_path, "", data="rows.csv")
    (tmp_path / "rows.csv").write_bytes("country,answer\nEspaña,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="rows.csv is not UTF-8 .byte 19"):
        task_files.load(path)


@pytest.mark.parametrize(("settings", "complaint"), [
    ({"num_fewshot": 2}, "num_fewshot is 2, and .* has 1 other rows"),
    ({"num_fewshot": "many"}, "num_fewshot is 'many': it must be a whole number"),
    ({"generation_kwargs": 5}, "generation_kwargs is 5"),
    ({"target_delimiter": 5}, "target_delimiter is 5, which is no text"),
    ({"doc_to_choice": None}, "lacks doc_to_choice"),
])
def test_bad_settings(tmp_path, settings, complaint):
    with pytest.raises(DataError, match=complaint):
        task_files.load(write(tmp_path, GOOD, **settings))


def test_shots_are_of_rows_unlike_the_item(tmp_path):
    """Of four rows two are alike: an item that has a twin can be shown the two others."""
    rows = [*GOOD, GOOD[0], GOOD[1] | {"country": "Malta"}]
    assert task_files.load(write(tmp_path, rows, num_fewshot=2))
    with pytest.raises(DataError, match="num_fewshot is 3, and .* has 2 other rows"):
        task_files.load(write(tmp_path, rows, num_fewshot=3))


WRITTEN = {"output_type": "generate_until", "doc_to_choice": None, "doc_to_target": "{{cities[answer]}}"}


def metric(name):
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True}]


@needs_harness
@pytest.mark.parametrize("settings", [
    {"filter_list": [{"name": "x", "filter": [{"function": "regex", "regex_pattern": "(("}, {"function": "take_first"}]}],
     "metric_list": metric("exact_match")},
    {"metric_list": metric("bits_per_byte")},
    {"metric_list": metric("exact_match"), "generation_kwargs": {"max_gen_toks": "few"}},
    {"metric_list": metric("exact_match"), "generation_kwargs": {"do_sample": True, "temperature": 1.0, "top_k": -3}},
])
def test_what_the_harness_would_fail_on_is_found_before_the_work(tmp_path, settings):
    path = write(tmp_path, GOOD, **WRITTEN, **settings)
    with pytest.raises(DataError, match=f"^{path}, .*(as it is defined .*: correct its settings|top_k is -3)"):
        rehearse(task_files.load(path))
    rehearse(task_files.load(write(tmp_path, GOOD, **WRITTEN, metric_list=metric("exact_match"))))


@needs_harness
def test_kinds_of_values_may_be_mixed(tmp_path):
    """A number here and its digits there, a field that only some items have: neither keeps a row from being read."""
    rows = [GOOD[0] | {"answer": "0"}, GOOD[1] | {"note": "capital since 1871"}, bad(answer="Vigo")[2]]
    asked = []

    class Model:
        rank, world_size = 0, 1

        def loglikelihood(self, requests):
            asked.extend(request.args for request in requests)
            return [(float(request.args[1] in (" Paris", " Bari", " Vigo")), False) for request in requests]

    row = harness.run_local(task_files.load(write(tmp_path, rows)), Model())
    assert row["score"] == 100.0 and row["items"] == 3
    assert asked[0] == ("The capital of France is", " Paris") and asked[-1] == ("The capital of Spain is", " Vigo")


@pytest.mark.parametrize("lines", [True, False])
def test_marks_within_a_text_divide_no_line(tmp_path, lines):
    """Line and paragraph separators, the next-line mark, a form feed; and a byte order mark at the file's start."""
    rows = [{"q": "a\u2028b\u2029c\x85d\x1ce", "n": n} for n in range(2)]
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\r\n".join(texts) + "\r\n\r\n" if lines else f" [{', '.join(texts)}]"
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "rows.jsonl").write_bytes(text.encode(encoding))
        assert read_rows(tmp_path / "rows.jsonl") == rows


@needs_harness
@pytest.mark.parametrize("settings", [
    {}, {"doc_to_text": "country", "doc_to_choice": "cities", "doc_to_target": "answer"}, {"doc_to_target": "[{{answer}}]"},
    {"doc_to_text": "{{answer}}", "doc_to_target": "is a city"}, {"doc_to_choice": ["x", "y"]}, {"doc_to_choice": {"a": "x", "b": "y"}},
    WRITTEN, WRITTEN | {"doc_to_target": "cities"},
])
def test_items_are_read_as_the_harness_reads_them(tmp_path, settings):
    from lm_eval.api.task import ConfigurableTask

    task = task_files.load(write(tmp_path, GOOD, **settings))
    with harness._offline(), harness._sandboxed():
        theirs = ConfigurableTask(config=dict(task.settings) | {
            "task": "x", "test_split": "test", "custom_dataset": lambda **_: {"test": Items(task.rows)}})
        reader = task_rows._Reader(task.settings, task.rows, task_files.sandbox())
        for row in task.rows:
            choices = theirs.doc_to_choice(row) if "doc_to_choice" in task.settings else None
            assert reader.read(row) == (theirs.doc_to_text(row), choices, theirs.doc_to_target(row))


@needs_data("benchmarks/piqa")
def test_an_answer_beyond_the_choices_of_a_benchmark(tmp_path):
    folder = tmp_path / "piqa"
    folder.mkdir()
    (folder / "valid.jsonl").write_text("".join((DATA / "benchmarks/piqa/valid.jsonl").read_text().splitlines(keepends=True)[:3]))
    (folder / "valid-labels.lst").write_text("1\n0\n0\n", encoding="utf-8-sig")
    (task,) = benchmarks.gather([tmp_path], ["piqa"]).local
    assert [row["gold"] for row in task.rows] == [1, 0, 0]
    (folder / "valid-labels.lst").write_text("1\n2\n0\n")
    with pytest.raises(DataError, match="the answer to item 2 of .*valid.jsonl is number 2 .from 0. of 2 choices: get piqa anew"):
        benchmarks.gather([tmp_path], ["piqa"])

"""The reports' tables from a result written by hand: means, intervals, what is marked, what is merged."""

import pytest

from mmcore.evaluation.intervals import wilson
from mmcore.evaluation.suite_plots import line_styles
from mmcore.evaluation.suite_report import command, merged, subjects
from mmcore.evaluation.suite_tables import Cell, depth_scores, family_interval, family_score, tables


def percent(hits, items):
    return {"score": 100 * hits / items, "items": items, "interval": [100 * end for end in wilson(hits, items)]}


def result(path, without, shift):
    """Scores that `shift` moves, so that it is known which model leads."""
    depths = [{"from": part / 5, "to": part / 5 + 0.2, "items": 2 if part < 2 else 0, "score": 50.0 * part if part < 2 else None}
              for part in range(5)]
    benchmarks = [("piqa", "persistent", 50.0, 6), ("hellaswag", "persistent", 25.0, 4), ("squad", "contextual", 0.0, 2)]
    best = {"form": "space, shuffled", "score": 40.0 + shift, "interval": [20.0, 60.0]}
    return {
        "checkpoint": path, "sha256": "ab" * 32, "variant": "without long_term" if without else "whole", "without": without,
        "model_type": "m", "parameters": 10, "trained_context": 2048, "tokenizer": "t",
        "persistent": [{"task": task, "group": group, "metric": "acc", "percent": True, "chance": chance, "metrics": {},
                        **percent(hits + shift, 10)} for task, group, chance, hits in benchmarks],
        "new_knowledge": [{"task": task, "length": length, "tokens": 900.0, "by_depth": depths, **percent(hits - shift, 4)}
                          for task, hits in (("qa_1", 3), ("qa_2", 2)) for length in (2048, 4096)],
        "in_context": [{"task": "mine", "labels": "semantic", "shots": shots, "classes": 4, "items": 10, "chance": 25.0, "best": best,
                        "mean": 30.0, "mean_interval": [10.0, 50.0], "forms": [best], "head_tokens": 10 * shots, "example": "x"}
                       for shots in (1, 2)],
    }


@pytest.fixture
def report():
    results = [result("runs/a", [], 0), result("runs/a", ["long_term"], 1), result("other/b", [], 2)]
    settings = {"without": ["long_term"], "limit": 10, "tasks": [], "lengths": [2048, 4096], "shots": [1, 2], "seed": 3,
                "ruler_exact": True, "online": False, "device": "cpu", "dtype": "float32", "tokenizer": None}
    return {"results": results, "suites": ["in-context"], "settings": settings, "notes": [],
            "given": {"checkpoints": ["runs/a", "other/b"], "data": ["my data"]}}


def found(report, key):
    return next(table for table in tables(report) if table.key == key)


def test_benchmarks_are_grouped_as_in_the_paper(report):
    table = found(report, "benchmarks")
    assert table.header == ["rests on", "benchmark", "chance", "a", "a without long_term", "b"]
    assert [str(cell) for cell in table.rows[0]] == [
        "the weights", "piqa acc, 10 items", "50.0", "60.0 [31.3, 83.2]", "70.0 [39.7, 89.2]", "80.0 [49.0, 94.3]"]
    assert [[str(cell) for cell in row] for row in table.rows[3:]] == [
        ["mean", "the weights 2 of 13 benchmarks", "", "50.0", "60.0", "70.0"],
        ["mean", "the context 1 of 6 benchmarks", "", "20.0", "30.0", "40.0"],
        ["mean", "all 3 benchmarks", "", "40.0", "50.0", "60.0"]]
    assert all([cell.best for cell in row[3:]] == [False, False, True] for row in table.rows)


def test_lengths_beyond_the_trained_are_marked(report):
    table = found(report, "qa-by-length")
    assert table.header == ["model", "trained at", "2,048", "4,096"]
    assert [cell.text for cell in table.rows[0]] == ["a", "2,048", "62.5", "62.5"]
    assert [[cell.beyond for cell in row[2:]] for row in table.rows] == [[False, True]] * 3
    assert [row[2].best for row in table.rows] == [True, False, False]
    assert table.rows[0][2].interval == pytest.approx([100 * end for end in wilson(5, 8)])  # 3 of 4 and 2 of 4


def test_families_and_depths_by_hand(report):
    rows = report["results"][0]["new_knowledge"]
    assert family_score(rows, ["qa_1", "qa_2"], 4096) == 62.5 and family_score(rows, ["qa_1"], 4096) == 75.0
    assert family_score(rows, ["niah_single_1"], 4096) is None and family_interval(rows, ["niah_single_1"], 4096) is None
    assert depth_scores(rows, ["qa_1", "qa_2"], 2048) == [0.0, 50.0, None, None, None]


def test_the_glance_has_the_means_of_all(report):
    lines = [[str(cell) for cell in row] for row in found(report, "glance").rows]
    assert lines == [
        ["Persistent knowledge", "what rests on the weights 2 tasks", "37.5", "50.0", "60.0", "70.0"],
        ["Persistent knowledge", "what rests on the context 1 task", "0.0", "20.0", "30.0", "40.0"],
        ["New knowledge", "question answering, 2,048 tokens 2 tasks", "0.0", "62.5", "37.5", "12.5"],
        ["New knowledge", "question answering, 4,096 tokens 2 tasks", "0.0", "62.5", "37.5", "12.5"],
        ["In-context learning", "semantic labels, 2 shots 1 task", "25.0", "40.0", "41.0", "42.0"]]


def test_means_are_over_the_tasks_that_all_have(report):
    """One model's hard task was passed over: its mean must not win by that. A column with nothing at all keeps its dash."""
    def row(task, score):
        return {"task": task, "group": "persistent", "metric": "acc", "percent": True, "items": 10, "score": score,
                "interval": None, "chance": 50.0, "metrics": {}, "shortened": 0}

    first, second, third = report["results"]
    first["persistent"] = [row("piqa", 80.0), row("arc-easy", 20.0)]
    second["persistent"], third["persistent"] = [row("piqa", 70.0)], []
    (line,) = [row for row in found(report, "glance").rows if "the weights" in str(row[1])]
    assert [str(cell) for cell in line[1:]] == ["what rests on the weights 1 task", "50.0", "80.0", "70.0", "-"]
    assert [cell.best for cell in line[3:]] == [True, False, False]
    means = [row for row in found(report, "benchmarks").rows if row[0].text == "mean"]
    assert [[cell.text for cell in row[3:5]] for row in means] == [["80.0", "70.0"]]


def test_best_and_mean_of_the_forms_are_compared_apart(report):
    rows = found(report, "mine-by-shots").rows
    assert [[cell.text for cell in row[:3]] for row in rows[:2]] == [["semantic", "a", "best"], ["semantic", "a", "mean"]]
    assert [row[3].best for row in rows] == [False, True, False, True, True, True]  # all means are alike


def test_equal_neighbours_are_one_cell(report):
    rows = merged(found(report, "mine-by-shots"))
    assert [[span for _, span in row] for row in rows] == [[6, 2, 1, 1, 1], [1, 1, 1]] + [[2, 1, 1, 1], [1, 1, 1]] * 2
    assert rows[0][0][0] == Cell("semantic")


def test_a_checkpoint_has_one_colour(report):
    a, removed, b = line_styles(report).values()
    assert a["color"] == removed["color"] != b["color"] and a["marker"] == removed["marker"] != b["marker"]
    assert (a["linestyle"], removed["linestyle"], b["linestyle"]) == ("-", "--", "-")


def test_the_command_and_the_title(report):
    assert subjects(report) == "a and b"
    assert command(report) == ("mm eval runs/a other/b --suite in-context --data 'my data' --without long_term --limit 10 --seed 3 "
                               "--device cpu --dtype float32 --lengths 2048,4096 --shots 1,2 --ruler-exact")

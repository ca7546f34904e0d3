"""What the suites are asked for: settings, data of two files with one name, tasks by name, what is noted."""

import pytest

from mmcore.errors import ConfigError, DataError
from mmcore.evaluation import suite_data, suites
from mmcore.evaluation.persistent import benchmarks
from mmcore.evaluation.suites import SuiteSettings


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_measures_something(limit):
    with pytest.raises(ConfigError, match=f"--limit is {limit}: it must be at least 1"):
        SuiteSettings(limit=limit)
    assert SuiteSettings(limit=1).limit == 1 and SuiteSettings().limit is None


def test_a_task_passed_over_is_noted_once_a_checkpoint_and_an_error_where_it_is_all():
    why = "piqa, item 7: too long"
    notes = suites._passed_over({"a": [why, why], "b": []}, [{"in_context": [{}]}, {}])
    assert notes == [f"passed over with a: {why}"]
    assert suites._passed_over({"b": []}, [{}]) == []
    with pytest.raises(DataError, match="nothing was measured: passed over with a: piqa, item 7"):
        suites._passed_over({"a": [why]}, [{}, {}])


def test_what_was_left_out_of_a_csv_is_noted(tmp_path):
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"{n},{n % 2}\n" for n in [*range(12), 3]))
    material = suite_data.gather(["in-context"], [tmp_path / "mine.csv"])
    notes = suites._notes([], SuiteSettings(), (), material)
    assert notes == ["mine: rows that say what an earlier one says were left out: 1"]


def write_csv(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("text,label\n" + "".join(f"{path} {n},{n % 2}\n" for n in range(12)))
    return path


def write_task(path, name):
    path.parent.mkdir(exist_ok=True)
    (path.parent / "rows.jsonl").write_text('{"q": "Rome is in", "c": ["Italy", "Peru"], "g": 0}')
    path.write_text(f"task: {name}\ndata: rows.jsonl\noutput_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\n"
                    "doc_to_choice: '{{c}}'\ndoc_to_target: '{{g}}'\n")
    return path


def test_two_csvs_of_one_name_are_refused(tmp_path):
    one, two = write_csv(tmp_path / "a" / "x.csv"), write_csv(tmp_path / "b" / "x.csv")
    with pytest.raises(ConfigError, match=f"{one} and {two} would both be called x: give one of them another name"):
        suite_data.gather(["in-context"], [one, two])
    assert len(suite_data.gather(["in-context"], [one, tmp_path / "a" / ".." / "a" / "x.csv"]).classifications) == 1


def test_two_tasks_of_one_name_are_refused(tmp_path):
    one, two = (write_task(tmp_path / name / "t.yaml", "capitals") for name in "ab")
    with pytest.raises(ConfigError, match=f"{one} and {two} both define the task capitals: rename one"):
        benchmarks.gather([one, two])
    assert [task.name for task in benchmarks.gather([one, one]).local] == ["capitals"]
    (tmp_path / "NQ-open.dev.jsonl").write_text('{"question": "who", "answer": ["I"]}')
    own = write_task(tmp_path / "c" / "t.yaml", "nq_open")
    with pytest.raises(ConfigError, match=f"NQ-open.dev.jsonl is the benchmark nq_open, and {own} defines a task of its name"):
        benchmarks.gather([tmp_path, own])
    assert [task.group for task in benchmarks.gather([own], ["nq_open"]).local] == ["own"]
    material = suite_data.gather(["in-context"], [write_csv(tmp_path / "capitals.csv")])
    with pytest.raises(ConfigError, match="capitals.csv and .*t.yaml.* both are 'capitals'"):
        suites._sources(material, benchmarks.gather([one]))


def test_tasks_of_files_can_be_chosen_and_left_out(tmp_path):
    capitals, other = write_task(tmp_path / "capitals.yaml", "capitals"), write_task(tmp_path / "other.yaml", "other")
    (tmp_path / "NQ-open.dev.jsonl").write_text('{"question": "who", "answer": ["I"]}')
    places = [tmp_path, capitals, other]

    def chosen(*only):
        suite_data.gather([], places, only)
        tasks = benchmarks.gather(places, only)
        return tasks and [task.name for task in tasks.local]

    assert chosen() == ["nq_open", "capitals", "other"]
    assert chosen("capitals") == ["capitals"] and chosen("nq_open") == ["nq_open"]
    assert chosen("other", "nq_open") == ["nq_open", "other"] and chosen("niah_single_2") is None
    with pytest.raises(ConfigError, match="there is no task 'capital': choose from arc_challenge.* capitals, .*other"):
        chosen("capital")

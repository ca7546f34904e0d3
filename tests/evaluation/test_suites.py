"""What the suites are asked for: settings, data of two files with one name, tasks by name, what is noted."""

import pytest

from mmcore.errors import ConfigError, DataError
from mmcore.evaluation import suite_data, suites
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

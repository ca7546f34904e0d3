"""The harness with our model inside: equal to its own Hugging Face model item by item, and closed to code and network."""

import json
import socket

import pytest

from mmcore.errors import ConfigError, DataError
from mmcore.evaluation import harness
from mmcore.evaluation.journal import Journal
from mmcore.evaluation.persistent import benchmarks, task_files
from tests.evaluation.test_prefix import Bytes, plainly
from tests.helpers.models import tiny
from tests.helpers.real_data import DATA, needs_data

CODE = "task: bad\ndata: rows.jsonl\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: '{{c}}'\ndoc_to_target: '{{g}}'\n"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def files(tmp_path):
    """Three tasks of a user, one of each kind of output."""
    rows = [{"q": f"{a} and {b} make", "c": [str(a + b), str(a + b + 1), "many"], "g": 0, "page": f"{a} is not {b}. " * (3 * a)}
            for a in range(1, 4) for b in range(2, 5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metric = "metric_list:\n  - metric: {}\n    aggregation: {}\n    higher_is_better: true\n"
    (tmp_path / "choice.yaml").write_text(CODE.replace("bad", "sums"))
    (tmp_path / "write.yaml").write_text(
        "task: written\ndata: rows.jsonl\noutput_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{c[0]}}'\n"
        "generation_kwargs: {until: ['\\n', 't'], max_gen_toks: 12}\n" + metric.format("exact_match", "mean"))
    (tmp_path / "rolling.yaml").write_text(
        "task: pages\ndata: rows.jsonl\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{page}}'\n"
        + metric.format("word_perplexity", "weighted_perplexity"))
    return [tmp_path / name for name in ("choice.yaml", "write.yaml", "rolling.yaml")]


def test_task_files_are_data(files):
    task = task_files.load(files[0])
    assert task.name == "sums" and task.group == "own" and len(task.rows) == 9 and "data" not in task.settings


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("'{{q}}'", "!function utils.text", "holds code .*!function"),
    ("'{{q}}'", "!!python/name:os.system", "holds code"),
    ("'{{q}}'", "'{{q.__class__.__mro__}}'", "the template doc_to_text holds code"),
    ("'{{q}}'", "'{{''.join.__globals__}}'", "the template doc_to_text (holds code|fails)"),
    ("'{{q}}'", "'{{missing}}'", "the template doc_to_text fails on the first item"),
    ("data: rows.jsonl", "data: rows.jsonl\ninclude: other.yaml", "the key 'include', which a task file may not have"),
    ("data: rows.jsonl", "data: rows.jsonl\ndataset_path: some/script", "the key 'dataset_path'"),
    ("data: rows.jsonl", "data: ../rows.jsonl", "name a file that lies beside"),
    ("data: rows.jsonl", "data: gone.jsonl", "which is missing: put it there"),
    ("multiple_choice", "anything", "output_type is 'anything'"),
    ("data: rows.jsonl", "data: rows.jsonl\nmetric_list: [{metric: someone/code}]", "which the harness would load as code"),
    ("data: rows.jsonl", "data: rows.jsonl\nfilter_list: [{name: x, filter: [{function: custom}]}]", "would load as code"),
    ("task: bad", "task: [", "cannot be read as YAML"),
])
def test_task_files_with_code_are_refused(tmp_path, files, old, new, complaint):
    path = tmp_path / "bad.yaml"
    path.write_text(CODE.replace(old, new))
    with pytest.raises(DataError, match=complaint):
        task_files.load(path)


@pytest.mark.skipif(harness._TemplateLM is not None, reason="lm_eval is installed")
def test_a_missing_harness_is_said():
    with pytest.raises(ConfigError, match=r"pip install 'mm\[harness\]'"):
        harness.require()


needs_harness = pytest.mark.skipif(harness._TemplateLM is None, reason="lm_eval is missing: pip install 'mm[harness]'")


@needs_harness
def test_own_tasks_run_without_a_network(tmp_path, files, no_network):
    """Scores against plain forward passes; an interrupted run's records are used again."""
    model = tiny(vocab_size=258, max_position_embeddings=80)
    tasks = benchmarks.Tasks(tuple(map(task_files.load, files)))
    ticks = []
    with Journal(tmp_path / "out") as journal:
        rows = harness.measure(tasks, model, Bytes(), journal, "m", 5, ticks.append)
        asked = len(journal.records)
        assert harness.measure(tasks, model, Bytes(), journal, "m", 5) == rows and len(journal.records) == asked
    assert [row["task"] for row in rows] == ["sums", "written", "pages"] and all(row["items"] == 5 for row in rows)
    assert ticks == sorted(ticks) and 0 < ticks[-1] <= 1
    right = 0
    for row in tasks.local[0].rows[:5]:
        scores = [plainly(model, [256, *row["q"].encode()], list(f" {choice}".encode()))[0] for choice in row["c"]]
        right += scores.index(max(scores)) == 0
    assert rows[0]["metrics"]["acc"] == right / 5


@needs_harness
def test_templates_meet_the_sandbox_while_the_harness_runs():
    from jinja2.sandbox import SecurityError
    from lm_eval.utils import apply_template

    with harness._sandboxed(), pytest.raises(SecurityError):
        apply_template("{{q.__class__.__mro__}}", {"q": "x"})
    with harness._sandboxed():
        assert apply_template("{{q | regex_replace('a+', 'b')}}", {"q": "xaay"}) == "xby"


@needs_harness
def test_answers_too_long_to_score():
    lm = harness.HarnessModel(tiny(vocab_size=258, max_position_embeddings=8), Bytes())
    with pytest.raises(DataError, match="an answer of 9 tokens cannot be scored"):
        lm._loglikelihood_tokens([(("", ""), [1], [2] * 9)])
    assert lm.apply_chat_template is not None and lm.tokenizer_name == "bytes"


@needs_data("benchmarks/piqa")
def test_local_benchmarks():
    tasks = benchmarks.gather([DATA / "benchmarks"])
    found = {task.name: task for task in tasks.local}
    assert set(found) == {"openbookqa", "arc_easy", "piqa", "hellaswag", "nq_open"}
    assert len(found["piqa"].rows) == 1838 and len(found["hellaswag"].rows) == 1000 and len(found["openbookqa"].rows) == 500
    assert found["arc_easy"].rows[0] == {
        "query": "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:",
        "choices": ["Sunlight is the source of energy for nearly all ecosystems.",
                    "Most ecosystems are found on land instead of in water.", "Carbon dioxide is more available than other gases.",
                    "The producers in all ecosystems are plants."], "gold": 0}
    assert found["piqa"].rows[0]["query"] == "Question: How do I ready a guinea pig cage for it's new occupants?\nAnswer:"
    for name in ("openbookqa", "arc_easy", "piqa", "hellaswag"):
        assert all(0 <= row["gold"] < len(row["choices"]) and all(row["choices"]) for row in found[name].rows)
    assert "not measured for want of local files: arc_challenge, winogrande" in tasks.notes[0]
    assert len(benchmarks.HARNESS_TASKS) + 1 == 19  # race-middle has no definition in the harness
    assert sum(group == benchmarks.PERSISTENT for group in benchmarks.GROUPS.values()) == 13


def test_missing_benchmarks_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no local file for piqa: .*piqa/valid.jsonl\), or --online"):
        benchmarks.gather([tmp_path], ["piqa"])
    with pytest.raises(ConfigError, match="set HF_ALLOW_CODE_EVAL=1 where that is safe"):
        harness.run_online("mbpp", None)


@needs_harness
@pytest.mark.slow
@needs_data("models/stories260K")
def test_scores_equal_the_harness_own_model(tmp_path, files, no_network, monkeypatch):
    """stories260K, exported, in lm-eval's HFLM at batch 1 and fp32: every choice, every answer, every page."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    import mmcore
    from mmcli.app import run

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = next(iter(sorted((DATA / "models/stories260K").glob("stories*.bin"))))
    assert run(["convert", str(source), str(tmp_path / "llama"), "--to", "hf"]) == 0
    model, tokenizer = mmcore.load_model(tmp_path / "llama"), mmcore.load_tokenizer(tmp_path / "llama")
    settings = dict(pretrained=str(tmp_path / "llama"), dtype="float32", batch_size=1, device="cpu", max_length=256)
    theirs = HFLM(**settings, add_bos_token=True)
    ours = harness.HarnessModel(model, tokenizer, max_length=256)
    tasks = [*map(task_files.load, files), *(t for t in benchmarks.gather([DATA / "benchmarks"]).local if t.name in ("piqa", "hellaswag"))]
    for task in tasks:
        if task.name == "pages":  # HFLM would score the begin token of each page as well
            theirs = HFLM(**settings, add_bos_token=False)
        mine, other = ([entry for entry in _samples(task, lm)] for lm in (ours, theirs))
        assert len(mine) == len(other) > 0
        for a, b in zip(mine, other, strict=True):
            _same(a, b, task.name)
        if task.name == "pages":
            theirs = HFLM(**settings, add_bos_token=True)


def _samples(task, lm):
    import datasets

    settings = dict(task.settings) | {"task": task.name, "test_split": "test", "fewshot_split": "test",
                                      "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(task.rows)}}
    with harness._offline(), harness._sandboxed():
        found = harness._evaluate([settings], lm, 6, include_defaults=False)
    return sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])


def _same(a, b, name):
    assert a["doc"] == b["doc"]
    for one, other in zip(a["resps"], b["resps"], strict=True):
        for x, y in zip(one, other, strict=True):
            if isinstance(x, str):
                assert x == y, name
            elif isinstance(x, tuple):
                assert x[0] == pytest.approx(y[0], abs=2e-4, rel=1e-6) and bool(x[1]) == bool(y[1]), name
            else:
                assert x == pytest.approx(y, rel=1e-5), name

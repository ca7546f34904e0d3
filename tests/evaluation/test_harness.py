"""The harness with our model inside: equal to its own Hugging Face model item by item, and closed to code and network."""

import dataclasses
import json
import math
import random
import socket

import pytest
import torch
from safetensors.torch import save_file

from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.errors import ConfigError, DataError
from mmcore.evaluation import harness
from mmcore.evaluation.journal import Journal
from mmcore.evaluation.persistent import benchmarks, task_files
from mmcore.evaluation.persistent.local import LocalTask
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
@pytest.mark.parametrize("knows", [True, False])
def test_an_oracle_scores_100_and_a_guesser_chance(tmp_path, files, knows, no_network):
    """On every kind of local benchmark, through the harness: the oracle finds the gold answer likeliest, or writes it."""
    rows = [{"query": f"{n}?", "choices": [f"a{n}", f"b{n}", f"c{n}", f"d{n}"], "gold": n % 4} for n in range(200)]
    choice = LocalTask("choice", "own", benchmarks.LOCAL["piqa"].settings, rows, "", "")
    rows = [{"query": f"Q: {n}?\nA:", "answers": [f"number {n}", "nothing"]} for n in range(50)]
    written = LocalTask("written", "own", benchmarks.LOCAL["nq_open"].settings, rows, "", "")
    draw = random.Random(0)

    class Oracle(harness.HarnessModel):
        def loglikelihood(self, requests, disable_tqdm=True):
            found = []
            for request in requests:
                _, ending = request.args
                gold = ending.strip() == request.doc["choices"][request.doc["gold"]]
                found.append((float(gold) if knows else draw.random(), False))
            return found

        def generate_until(self, requests, disable_tqdm=True):
            return [f" The {request.doc['answers'][0]}" if knows else " 7" for request in requests]

    lm = Oracle(tiny(vocab_size=258), Bytes())
    first, second = harness.run_local(choice, lm), harness.run_local(written, lm)
    assert (first["chance"], second["chance"]) == (25.0, 0.0) and (first["items"], second["items"]) == (200, 50)
    if knows:
        assert first["score"] == second["score"] == 100.0
    else:
        assert first["interval"][0] < 25 < first["interval"][1] and second["score"] == 0.0


@needs_harness
def test_the_seed_reaches_what_is_drawn_and_what_is_shown(tmp_path):
    """Answers are drawn by it; examples are the harness's own with 0. A greedy answer's key depends on the seed as little
    as the answer does."""
    rows = [{"q": f"{n} is", "a": f"number {n}"} for n in range(30)]
    drawn = {"output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "generation_kwargs":
             {"until": ["~"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0},
             "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    greedy = drawn | {"generation_kwargs": {"until": ["~"], "max_gen_toks": 8}}
    model = tiny(vocab_size=258)

    def written(settings, seed, limit=2):
        with Journal(tmp_path / "out") as journal:
            before = len(journal.records)
            task = LocalTask("t", "own", settings, rows, "", "")
            harness.measure(benchmarks.Tasks((task,)), model, Bytes(), journal, "m", limit, seed=seed)
            return [(one["prompt"], one["prediction"]) for one in journal.records.values()][before:]

    first, second = written(drawn, 0), written(drawn, 7)
    assert [prompt for prompt, _ in first] == [prompt for prompt, _ in second] == ["0 is", "1 is"]
    assert first != second and written(drawn, 7) == []
    assert len(written(greedy, 0)) == 2 and written(greedy, 7) == []
    (zero, _), (seven, _) = (written(greedy | {"num_fewshot": 3}, seed, 1)[0] for seed in (0, 7))
    shown = [row for row in random.Random(harness.FEWSHOT_SEED).sample(rows, 4) if row != rows[0]][:3]
    assert zero == "".join(f"{row['q']} {row['a']}\n\n" for row in shown) + "0 is" != seven


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


@needs_harness
def test_a_task_with_an_answer_too_long_is_passed_over(tmp_path):
    """It is named with its item, nothing of it is scored in vain, and the other tasks have their rows."""
    settings = benchmarks.LOCAL["piqa"].settings
    rows = [{"query": f"{n}?", "choices": ["yes", "no" * n], "gold": 0} for n in (1, 2, 20)]
    tasks = benchmarks.Tasks((LocalTask("long", "own", settings, rows, "", ""), LocalTask("short", "own", settings, rows[:2], "", "")))
    model, passed_over = tiny(vocab_size=258, max_position_embeddings=24), []
    with Journal(tmp_path) as journal:
        (row,) = harness.measure(tasks, model, Bytes(), journal, "m", passed_over=passed_over)
        assert row["task"] == "short" and row["items"] == 2
        assert {record["task"] for record in journal.records.values()} == {"short"}
        (reason,) = passed_over
        assert reason.startswith("long, item 3: an answer of 41 tokens cannot be scored, as this model reads 1 to 24")
        with pytest.raises(harness.Unscorable, match="long, item 3"):
            harness.measure(tasks, model, Bytes(), journal, "m")


@needs_harness
@pytest.mark.parametrize(("output", "metric", "aggregation"), [
    ("loglikelihood_rolling", "word_perplexity", "weighted_perplexity"), ("loglikelihood", "perplexity", "perplexity")])
def test_a_perplexity_beyond_floats_is_infinite(output, metric, aggregation):
    """Of one word e^700 is the last power of e that a float holds in hundreds."""
    settings = {"output_type": output, "doc_to_text": "", "doc_to_target": "{{page}}",
                "metric_list": [{"metric": metric, "aggregation": aggregation, "higher_is_better": False}]}
    task = LocalTask("page", "own", settings, [{"page": "word"}], "", "")

    class Model:
        rank, world_size = 0, 1

        def loglikelihood(self, requests):
            return [(-self.nats, False) for _ in requests]

        def loglikelihood_rolling(self, requests):
            return [-self.nats for _ in requests]

    for nats, score in ((2.0, math.exp(2)), (700.0, math.exp(700)), (800.0, math.inf)):
        lm = Model()
        lm.nats = nats
        assert harness.run_local(task, lm)["score"] == pytest.approx(score)


@needs_harness
def test_what_does_not_fit_loses_its_beginning_and_is_counted(tmp_path, files):
    """pages of 80 bytes and more in windows of 30 lose nothing; a question of 14 bytes and its begin token does."""
    model = tiny(vocab_size=258, max_position_embeddings=10)
    tasks = benchmarks.Tasks(tuple(map(task_files.load, files)))
    with Journal(tmp_path / "out") as journal:
        rows = {row["task"]: row for row in harness.measure(tasks, model, Bytes(), journal, "m", 5)}
        assert (rows["sums"]["shortened"], rows["written"]["shortened"], rows["pages"]["shortened"]) == (15, 5, 0)
        asked = [record for record in journal.records.values() if record["task"] == "written"]
    assert all(len(record["prediction"]) <= 5 for record in asked)  # half of 10 tokens, where the task asks for 12
    longer = tiny(vocab_size=258, max_position_embeddings=40)
    with Journal(tmp_path / "longer") as journal:
        assert not any(row["shortened"] for row in harness.measure(tasks, longer, Bytes(), journal, "m", 5))


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
    assert len(benchmarks.NAMES) == 19
    assert sum(group == benchmarks.PERSISTENT for group in benchmarks.GROUPS.values()) == 13


def test_race_reads_as_the_harness_words_it(tmp_path):
    folder = tmp_path / "RACE" / "test" / "middle"
    folder.mkdir(parents=True)
    page = {"article": "Tom has a dog.", "questions": ["What has Tom?", "Tom has a  _  .", "Who has a dog?"],
            "options": [["Cat", "Dog", "Cow", "Ox"], ["cat", "dog", "cow", "ox"], ["Ann", "Bob", "Tim", "Tom"]],
            "answers": ["B", "B", "D"], "id": "middle1.txt"}
    for name in ("10.txt", "9.txt"):
        (folder / name).write_text(json.dumps(page | {"article": name}))
    (task,) = benchmarks.gather([tmp_path], ["race_middle"]).local
    assert task.group == benchmarks.CONTEXTUAL and len(task.rows) == 2 and len(task.sha256) == 64
    assert task.rows[0] == {
        "query": "Article: 9.txt\n\nQuestion: What has Tom?\nAnswer: Dog\nTom has a dog\nWho has a dog?",
        "choices": ["Ann", "Bob", "Tim", "Tom"], "gold": 3}
    (folder / "9.txt").write_text(json.dumps(page | {"answers": ["B"]}))
    with pytest.raises(DataError, match="departs from race_middle's layout"):
        benchmarks.gather([tmp_path], ["race_middle"])
    with pytest.raises(DataError, match="no local file for race_middle"):
        benchmarks.gather([tmp_path / "RACE" / "test" / "middle"], ["race_middle"], online=True)


@needs_harness
def test_race_equals_the_harness_own_preparation(tmp_path):
    from lm_eval.tasks.race import preprocess_race

    folder = tmp_path / "RACE" / "test" / "high"
    folder.mkdir(parents=True)
    page = {"article": "Ann reads.", "questions": ["Ann  _  .", "Who?", "What?"], "answers": ["A", "C", "D"],
            "options": [["reads", "eats", "runs", "sits"], ["A", "B", "Ann", "C"], ["w", "x", "y", "a book"]]}
    (folder / "1.txt").write_text(json.dumps(page))
    (row,) = benchmarks.gather([tmp_path], ["race_high"]).local[0].rows
    problems = [{"question": q, "options": o, "answer": a} for q, o, a in zip(page["questions"], page["options"], page["answers"], strict=True)]
    doc = {"article": page["article"], "problems": repr(problems)}
    assert row == {"query": preprocess_race.doc_to_text(doc), "choices": preprocess_race.doc_to_choice(doc),
                   "gold": preprocess_race.doc_to_target(doc)}


def test_missing_benchmarks_are_named(tmp_path):
    with pytest.raises(DataError, match=r"no local file for piqa: .*piqa/valid.jsonl\), or --online"):
        benchmarks.gather([tmp_path], ["piqa"])
    with pytest.raises(ConfigError, match="set HF_ALLOW_CODE_EVAL=1 where that is safe"):
        harness.run_online("mbpp", None)


@needs_harness
@pytest.mark.slow
@needs_data("models/stories260K")
@pytest.mark.parametrize("which", ["llama", "mosaic"])
def test_scores_equal_the_harness_own_model(tmp_path, files, no_network, monkeypatch, which):
    """An exported checkpoint in lm-eval's HFLM at batch 1 and fp32: every choice, every answer, every page. stories260K is
    a trained Llama; the mosaic, with its tokenizer, runs through the classes for transformers."""
    from lm_eval.models.huggingface import HFLM

    import mmcore
    import mmcore.hf
    from mmcli.app import run

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / which
    source = next(iter(sorted((DATA / "models/stories260K").glob("stories*.bin"))))
    assert run(["convert", str(source), str(tmp_path / "llama"), "--to", "hf"]) == 0
    if which == "mosaic":
        _save_mosaic(tmp_path / "torch", mmcore.load_tokenizer(tmp_path / "llama"))
        assert run(["convert", str(tmp_path / "torch"), str(folder), "--to", "hf"]) == 0
    model, tokenizer = mmcore.load_model(folder), mmcore.load_tokenizer(folder)
    settings = dict(pretrained=str(folder), dtype="float32", batch_size=1, device="cpu", max_length=256)
    ours = harness.HarnessModel(model, tokenizer, max_length=256)
    # With a begin token HFLM would score the begin token of each page as well.
    with_begin, without = (HFLM(**settings, add_bos_token=begin) for begin in (True, False))
    local = {task.name: task for task in benchmarks.gather([DATA / "benchmarks"]).local}
    answers = local["nq_open"].settings | {"generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 24}}
    written = dataclasses.replace(local["nq_open"], settings=answers)  # with the harness's own 256 tokens it takes minutes
    for task in [*map(task_files.load, files), local["piqa"], local["hellaswag"], written]:
        mine, other = (_samples(task, lm) for lm in (ours, without if task.name == "pages" else with_begin))
        assert len(mine) == len(other) > 0
        for a, b in zip(mine, other, strict=True):
            _same(a, b, task.name)


def _save_mosaic(folder, tokenizer):
    """A mosaic with weights large enough that its predictions depend on what it has read."""
    folder.mkdir()
    model = tiny(vocab_size=512, max_position_embeddings=256, short_term_window=32, long_term_delay=8,
                 long_term_delay_range=(8, 32))
    with torch.no_grad():  # the 256 byte pieces are never likeliest: broken UTF-8 is written differently by transformers
        model.lm_head.weight[3:259] = 0
    settings = config_json(model.config, torch.float32, tokenizer.bos_id, tokenizer.eos_id)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors")
    tokenizer.save(folder)


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

"""`mm eval` as a user runs it: on a run, on an exported folder, side by side, and with bad input."""

import json
import math
import os

import pytest
import torch
import yaml
from safetensors.torch import save_file

from mmcli.app import run
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.store import save_checkpoint
from mmcore.config import DataConfig, ModelConfig, SourceConfig
from mmcore.data import prepare, train_sentencepiece
from mmcore.model import build_model

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards hum and the cat sleeps".split()
DOCUMENTS = [" ".join(WORDS[(7 * n + n * i * i) % len(WORDS)] for i in range(40 + 5 * n)) + "." for n in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentencepiece(DOCUMENTS, 300)


def tiny(model_type="memory_mosaics_v2"):
    config = ModelConfig(
        model_type=model_type, vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, short_term_window=8, long_term_delay=4, long_term_delay_range=(4, 8),
        max_position_embeddings=32,
    )
    model = build_model(config)
    model.init_weights(seed=0)
    return model


def export(model, folder, tokenizer):
    folder.mkdir()
    settings = config_json(model.config, torch.float32, tokenizer.bos_id, tokenizer.eos_id)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors")
    tokenizer.save(folder)
    return folder


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """A folder with two exported models, a text, and a run that held documents out; commands run in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    export(tiny(), tmp_path / "mosaic", tokenizer)
    export(tiny("llama"), tmp_path / "llama", tokenizer)
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS))
    return tmp_path


def make_run(place, tokenizer, state=None, **data):
    """A run folder with one checkpoint, whose recipe says what was held out, and `state` what it was trained on."""
    model = tiny()
    values = {"model": {"vocab_size": 300}, "data": {"sources": [{"path": str(place / "text.txt")}], **data}}
    save_checkpoint(
        place / "run", 1, model={name: p.detach() for name, p in model.named_parameters()}, optimizer={}, state=state or {},
        config=config_json(model.config, torch.float32, tokenizer.bos_id, tokenizer.eos_id),
        files={"recipe.yaml": yaml.safe_dump(values).encode(), **tokenizer.files()},
    )
    return place / "run"


def evaluated(capsys, *arguments):
    assert run(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *arguments):
    """The one line that a mistake is answered with."""
    assert run(["eval", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("mm: ") and captured.err.count("\n") == 1
    return captured.err


def test_json_and_files(place, capsys):
    report = evaluated(capsys, "mosaic", "--data", "text.txt", "--compressors", "--out", "out")
    (result,) = report["results"]
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bytes"] == sum(len(document) for document in DOCUMENTS) == report["text"]["bytes"]
    nats = result["loss"] * result["tokens"]
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"])
    assert set(report["compressors"]) == {"gzip -9", "xz -9"}
    assert result["by_position"]["bins"][-1]["last"] == 8 * 32
    assert json.loads((place / "out" / "results.json").read_text())["results"] == report["results"]
    assert sorted(os.listdir(place / "out")) == ["by-position.png", "by-position.svg", "results.json", "results.md"]


def test_tables_and_what_comes_next(place, capsys):
    assert run(["eval", "mosaic", "llama", "--data", "text.txt"]) == 0
    text = capsys.readouterr().out
    for expected in ("bits per byte", "Loss by position", "mosaic", "llama", "Every token is scored once", "mm chat mosaic"):
        assert expected in text
    (folder,) = (place / "mosaic").glob("eval-*")
    assert str(folder.relative_to(place)) in text


def test_without_changes_the_loss_and_is_said(place, capsys):
    whole = evaluated(capsys, "mosaic", "--data", "text.txt", "--out", "a")["results"][0]
    removed = evaluated(
        capsys, "mosaic", "--data", "text.txt", "--out", "b", "--without", "long_term", "--without", "persistent"
    )["results"][0]
    assert removed["without"] == ["long_term", "persistent"] and whole["without"] == []
    assert removed["loss"] != whole["loss"] and removed["tokens"] == whole["tokens"]


def test_int8_weights_move_the_loss_a_little(place, capsys):
    before, after = (
        evaluated(capsys, "mosaic", "--data", "text.txt", "--longest", "0", *dtype)["results"][0]["loss"]
        for dtype in ((), ("--dtype", "int8"))
    )
    assert 0 < abs(after / before - 1) < 0.01
    assert "choose float32, bfloat16" in complaint(capsys, "mosaic", "--data", "text.txt", "--dtype", "int4")


def test_held_out_documents_are_the_default(place, capsys, tokenizer):
    folder = make_run(place, tokenizer, validation_fraction=0.3)
    report = evaluated(capsys, folder)
    assert 0 < report["text"]["documents"] < len(DOCUMENTS)
    assert "held out" in report["text"]["name"]
    assert report["folder"].startswith(str(folder / "eval-"))
    everything = evaluated(capsys, folder, "--data", "text.txt")
    assert everything["text"]["bytes"] > report["text"]["bytes"]


def test_other_data_than_were_trained_on_hold_nothing_out(place, capsys, tokenizer):
    """A document that is gone moves others from training to what is held out, or the path means other files here."""
    config = DataConfig(sources=[SourceConfig(path=str(place / "text.txt"))], validation_fraction=0.3)
    identity = prepare(config, tokenizer).fingerprint["identity"]
    folder = make_run(place, tokenizer, {"data_identity": identity}, validation_fraction=0.3)
    assert "held out" in evaluated(capsys, folder, "--longest", "0")["text"]["name"]
    (place / "text.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS[1:]))
    assert "not those it was trained on" in complaint(capsys, folder, "--longest", "0")
    assert evaluated(capsys, folder, "--data", "text.txt", "--longest", "0")["results"]


def test_what_is_given_and_not_read_is_said(place, capsys):
    """Files that are no text, and the second of two equal ones, in the results and on the terminal."""
    (place / "set").mkdir()
    (place / "set" / "a.txt").write_text(DOCUMENTS[0])
    for number in range(3):
        (place / "set" / f"{number}.docx").write_text("x")
    command = ["mosaic", "--data", "set", "--data", "set/a.txt", "--longest", "0"]
    report = evaluated(capsys, *command)
    assert report["text"]["bytes"] == len(DOCUMENTS[0])
    notes = ["set holds files that are no text and were left out: 3 .docx", "given more than once and counted once: set/a.txt"]
    assert report["notes"] == notes
    assert run(["eval", *command]) == 0
    shown = capsys.readouterr().out
    assert all(f"Note: {note}." in shown for note in notes)


def test_what_was_measured_is_kept_where_its_folder_is_taken_meanwhile(place, capsys, monkeypatch):
    from mmcore.evaluation import runner

    def measure(*given, before=runner.evaluate):
        (place / "out").mkdir()
        (place / "out" / "thesis.tex").write_text("x")
        return before(*given)

    monkeypatch.setattr(runner, "evaluate", measure)
    assert run(["eval", "mosaic", "--data", "text.txt", "--longest", "0", "--out", "out"]) == 0
    (folder,) = (place / "mosaic").glob("eval-*")
    captured = capsys.readouterr()
    assert (folder / "results.json").is_file() and os.listdir(place / "out") == ["thesis.tex"]
    assert "out exists and holds other things" in captured.err and str(folder.name) in captured.out


def test_a_longer_context_is_said(place, capsys):
    report = evaluated(capsys, "mosaic", "--data", "text.txt", "--context", "48", "--longest", "0")
    assert any("longer than the 32 it was trained for" in note for note in report["notes"])
    assert "by_position" not in report["results"][0]


def test_max_tokens(place, capsys):
    report = evaluated(capsys, "mosaic", "--data", "text.txt", "--max-tokens", "300")
    result = report["results"][0]
    assert 250 <= result["tokens"] <= 300 and result["bytes"] < report["text"]["bytes_given"]
    assert any("--max-tokens 0 scores all" in note for note in report["notes"])
    assert result["by_position"]["sequences"] == 1


def test_mistakes_are_answered_with_one_line(place, capsys, tokenizer):
    (place / "empty.txt").touch()
    (place / "binary.txt").write_bytes(b"a\0b")
    (place / "latin.txt").write_bytes("café".encode("latin-1"))
    (place / "other.txt").write_text("mine")
    assert "there is no file" in complaint(capsys, "mosaic", "--data", "missing.txt")
    assert "empty" in complaint(capsys, "mosaic", "--data", "empty.txt")
    assert "binary" in complaint(capsys, "mosaic", "--data", "binary.txt")
    assert "not UTF-8" in complaint(capsys, "mosaic", "--data", "latin.txt")
    assert "there is no checkpoint" in complaint(capsys, "nowhere", "--data", "text.txt")
    assert "no memory 'episodic'" in complaint(capsys, "mosaic", "--data", "text.txt", "--without", "episodic")
    assert "give --data FILE" in complaint(capsys, "mosaic")
    (place / "rows.jsonl").write_text('{"body": "some words"}\n')
    assert "--text-key" in complaint(capsys, "mosaic", "--data", "rows.jsonl")
    assert "there is none: give --data" in complaint(capsys, "mosaic", "--text-key", "body")
    assert "--context is 0" in complaint(capsys, "mosaic", "--data", "text.txt", "--context", "0")
    assert "--max-tokens" in complaint(capsys, "mosaic", "--data", "text.txt", "--max-tokens", "-5")
    assert "other things than an earlier report" in complaint(capsys, "mosaic", "--data", "text.txt", "--out", ".")
    assert not list((place / "mosaic").glob("eval-*"))


def test_text_of_another_field_and_a_tokenizer_of_another_model(place, capsys, tokenizer):
    rows = "".join(json.dumps({"body": document}) + "\n" for document in DOCUMENTS)
    (place / "rows.jsonl").write_text(rows)
    from_rows = evaluated(capsys, "mosaic", "--data", "rows.jsonl", "--text-key", "body", "--longest", 0)["results"][0]
    from_text = evaluated(capsys, "mosaic", "--data", "text.txt", "--longest", 0)["results"][0]
    assert from_rows["tokens"] == from_text["tokens"]
    (place / "large").mkdir()
    train_sentencepiece(DOCUMENTS, 320).save(place / "large")
    said = complaint(capsys, "mosaic", "--data", "text.txt", "--tokenizer", "large")
    assert "the tokenizer knows 320 tokens and the model 300: use the tokenizer" in said


def test_short_names_stand_in_one_line_of_a_narrow_terminal(place, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert run(["eval", "mosaic", "llama", "--data", "text.txt", "--longest", "0", "--compressors"]) == 0
    shown = capsys.readouterr().out
    assert all(any(line.split()[:1] == [name] for line in shown.splitlines()) for name in ("mosaic", "llama"))
    assert "gzip -9" in shown


def test_memories_may_be_named_together(place, capsys):
    together, apart = (
        evaluated(capsys, "mosaic", "--data", "text.txt", "--longest", 0, *words)["results"][0]
        for words in (("--without", "long_term,short_term"), ("--without", "long_term", "--without", "short_term"))
    )
    together["seconds"] = apart["seconds"]
    assert together == apart and set(together["without"]) == {"long_term", "short_term"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_said_before_the_work(place, capsys):
    (place / "locked").mkdir(mode=0o500)
    assert "cannot be written" in complaint(capsys, "mosaic", "--data", "text.txt", "--out", "locked/out")


def test_help_is_light():
    import subprocess
    import sys

    code = "import sys; from mmcli.app import run; run(['eval', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--without" in done.stdout and "Example" in done.stdout


def test_progress_in_a_log_is_a_line_now_and_then():
    from mmcli.evaluate_console import plain_text_progress

    lines = []

    class Log:
        def print(self, line):
            lines.append(line)

    progress = plain_text_progress(Log(), every=0.0)
    progress("every token", 10, 100)  # the first call only starts the clock
    progress("every token", 50, 100)
    assert len(lines) == 1 and lines[0].startswith("every token: 50 of 100 tokens, ") and lines[0].endswith(" s left")

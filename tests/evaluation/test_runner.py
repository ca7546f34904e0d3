"""The figures of an evaluation: by hand, and against models whose weights say the same."""

import gzip
import lzma
import math

import numpy as np
import pytest
import torch

from mmcore.errors import ConfigError, DataError, HardwareError, NonFiniteError
from mmcore.evaluation import runner
from mmcore.evaluation.compressors import compressed_bits_per_byte
from mmcore.evaluation.runner import Settings, measure
from mmcore.evaluation.text import make_text, read_files, sample
from tests.evaluation.models import BEGIN, END, ByteTokenizer, small_model

CPU = torch.device("cpu")
TEXT = make_text(
    ["the cat sat on the mat; " * 20, "dogs, naïve dogs – über dogs. " * 3, "x", "rain in Spain " * 9], "four documents"
)


def measured(model, text=TEXT, part=None, **settings):
    return measure(model, ByteTokenizer(), text, part or text, Settings(**settings), CPU)


def test_figures_by_hand():
    """A model that gives every token the same probability: ln 258 nats a token, end tokens included."""
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = measured(model, longest=0)
    size = sum(len(document.encode()) for document in TEXT.documents)
    tokens = size + len(TEXT.documents)
    assert found["tokens"] == tokens and found["bytes"] == size and found["documents"] == 4
    assert found["loss"] == pytest.approx(math.log(258), rel=1e-6)
    assert found["perplexity"] == pytest.approx(258, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(tokens * math.log2(258) / size, rel=1e-6)
    assert found["standard_error"] == pytest.approx(0, abs=1e-6)
    assert "by_position" not in found


def test_perplexity_equals_the_models_logits_in_float64():
    """Documents shorter than the context: one plain forward pass each says everything."""
    model = small_model(context=1024)
    found = measured(model, longest=0)
    losses = []
    for document in TEXT.documents:
        tokens = torch.tensor([BEGIN, *document.encode(), END])
        with torch.no_grad():
            logits = model(tokens[None, :-1])[0].double()
        losses += (-torch.log_softmax(logits, dim=-1).gather(1, tokens[1:, None])[:, 0]).tolist()
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert found["tokens"] == len(losses)


@pytest.mark.parametrize("memory", ["short_term", "long_term", "persistent"])
def test_a_removed_memory_equals_zeroed_output_columns(memory):
    """W_o's first d columns read the short-term heads, the others the long-term ones; W_2 reads the persistent one."""
    removed = measured(small_model().without((memory,)))
    model = small_model()
    width = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            if memory == "persistent":
                layer.persistent.down_proj.weight.zero_()
            else:
                start = 0 if memory == "short_term" else width
                layer.out_proj.weight[:, start : start + width] = 0
    zeroed = measured(model)
    assert removed["without"] == [memory]
    assert removed["loss"] == pytest.approx(zeroed["loss"], rel=1e-6)
    assert removed["loss"] != pytest.approx(measured(small_model())["loss"], rel=1e-4)
    for a, b in zip(removed["by_position"]["bins"], zeroed["by_position"]["bins"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_loss_by_position_recombines_and_reaches_eight_times_the_context():
    found = measured(small_model(context=32))
    by_position = found["by_position"]
    assert by_position["longest"] == 256 and by_position["sequences"] == 1 and not by_position["concatenated"]
    total = sum(part["loss"] * part["count"] for part in by_position["bins"])
    assert total == pytest.approx(by_position["loss"] * by_position["tokens"], rel=1e-9)
    assert {32, 64, 128, 256} <= {part["last"] for part in by_position["bins"]}
    assert found["notes"] == []


def test_notes_say_what_a_reader_must_know():
    notes = " ".join(measured(small_model(context=64))["notes"])
    assert "no document is 512 tokens long" in notes and "joined" in notes
    notes = " ".join(measured(small_model(context=512))["notes"])
    assert "the loss by position ends there" in notes
    assert "longer than the 32 it was trained for" in " ".join(measured(small_model(), context=40)["notes"])


def test_more_context_is_never_hidden():
    """The policy's figures are in the result: what was read is what was asked for."""
    found = measured(small_model(), context=20, stride=7, longest=0)
    assert (found["context"], found["stride"]) == (20, 7)
    with pytest.raises(ConfigError, match="--stride is 21, longer than the context of 20"):
        measured(small_model(), context=20, stride=21)


def test_not_finite_is_refused():
    model = small_model()
    with torch.no_grad():
        model.model.layers[0].out_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        measured(model)


def test_standard_error_of_documents_by_hand():
    sums, counts = np.array([10.0, 30.0]), np.array([10.0, 10.0])
    # Means 1 and 3 of equal weight: deviation sqrt(2), error of the mean 1.
    assert runner._clustered_error(sums, counts) == pytest.approx(1.0)
    assert runner._clustered_error(sums[:1], counts[:1]) is None


def test_compressors():
    texts = ["to be or not to be " * 50, "that is the question " * 50]
    stream = "".join(texts).encode()
    found = compressed_bits_per_byte(texts)
    assert found["gzip -9"] == 8 * len(gzip.compress(stream, compresslevel=9, mtime=0)) / len(stream)
    assert found["xz -9"] == 8 * len(lzma.compress(stream, preset=9)) / len(stream)
    with pytest.raises(ValueError, match="no text"):
        compressed_bits_per_byte([""])


def test_a_sample_is_whole_documents_and_one_cut():
    text = make_text([f"document {n} " * (n + 1) for n in range(40)], "forty")
    part = sample(text, ByteTokenizer().encode, 1500)
    tokens = sum(len(document.encode()) + 1 for document in part.documents) - (part.unfinished is not None)
    assert 1400 <= tokens <= 1500
    for index, document in enumerate(part.documents):
        if index == part.unfinished:
            assert any(whole.startswith(document) and whole != document for whole in text.documents)
        else:
            assert document in text.documents
    places = [next(i for i, whole in enumerate(text.documents) if whole.startswith(d)) for d in part.documents]
    assert places == sorted(places)
    assert sample(text, ByteTokenizer().encode, None) is text
    assert sample(text, ByteTokenizer().encode, 10**6).sha256 == text.sha256


def test_a_single_long_document_is_cut():
    text = make_text(["word " * 1000], "a book")
    part = sample(text, ByteTokenizer().encode, 101)
    assert part.unfinished == 0 and 95 <= part.bytes <= 101
    found = measured(small_model(), text, part, longest=0)
    assert found["tokens"] == part.bytes  # no end token: the document does not end here


@pytest.mark.parametrize("settings, message", [
    ({"context": 0}, "--context is 0"), ({"max_tokens": 1}, "--max-tokens is 1"), ({"longest": -1}, "--longest is -1"),
    ({"batch_size": 0}, "--batch-size is 0"), ({"device": "tpu"}, "choose auto, cpu or cuda"),
])
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        Settings(**settings)


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(HardwareError, match="there is no GPU"):
        runner.pick_device("cuda")


def test_unknown_memories_are_refused():
    with pytest.raises(ConfigError, match="no memory 'episodic'"):
        small_model().without(("episodic",))


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"), (b"abc\x00def", "binary"), (b"caf\xe9 au lait", "not UTF-8"), (b" \n\n ", "holds no text"),
])
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_files([path])


def test_a_missing_file():
    with pytest.raises(DataError, match="there is no file"):
        read_files(["nowhere.txt"])


def test_files_are_read_as_a_recipes_sources(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n', encoding="utf-8")
    text = read_files([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert text.documents == ["one", "two", "three"] and text.bytes == 11
    assert text.notes == ()


def test_a_file_given_twice_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name in "abc":
        (tmp_path / f"set/{name}.txt").write_text(f"text of {name}")
    (tmp_path / "link.txt").symlink_to(tmp_path / "set/a.txt")
    once = read_files(["set/a.txt"])
    text = read_files(["set/a.txt", "link.txt", tmp_path / "set/a.txt", "set/../set/a.txt"])
    assert (text.documents, text.sha256, text.name) == (["text of a"], once.sha256, once.name)
    assert text.notes[0] == "given more than once and counted once: link.txt" and len(text.notes) == 3
    text = read_files(["set/a.txt", "set", "set"])
    assert text.documents == ["text of a", "text of b", "text of c"] and text.name == "set/a.txt, set"
    assert text.notes == ("given more than once and counted once: 1 of the 3 files in set",
                          "given more than once and counted once: set")

"""n-shot prompts written out, labels that begin alike, an oracle and a guesser, data as users have them."""

import json

import pytest

from mmcore.errors import ConfigError, DataError
from mmcore.evaluation import suite_data
from mmcore.evaluation.in_context import datasets, suite
from mmcore.evaluation.in_context.prompts import FORMS, draw_shots, head, label_names, opened, terminator
from mmcore.evaluation.intervals import wilson
from mmcore.evaluation.journal import Journal
from mmcore.evaluation.reading import ModelReader
from tests.evaluation.models import BEGIN
from tests.evaluation.test_prefix import Bytes, plainly
from tests.helpers.models import tiny
from tests.helpers.real_data import DATA, needs_data

NEWLINE, NEWLINE_SHUFFLED, SPACE, SPACE_SHUFFLED = FORMS


@pytest.fixture
def animals(tmp_path):
    """A user's CSV: four classes, one the beginning of another, 12 texts each."""
    rows = [f"{label} number {n} does {what}{n},{label}" for label, what in
            (("cat", "miaow"), ("cat fish", "swim"), ("dog", "bark"), ("owl", "hoot")) for n in range(12)]
    (tmp_path / "animals.csv").write_text("Text,Label\n" + "\n".join(rows) + "\n")
    return datasets.from_csv(tmp_path / "animals.csv")


def test_a_csv_becomes_a_task(animals):
    assert animals.name == "animals" and animals.labels == ("cat", "cat fish", "dog", "owl")
    assert len(animals.asked) == 4 * 3 and len(animals.shown) == 4 * 9
    assert not {example.pieces for example in animals.asked} & {example.pieces for example in animals.shown}
    assert datasets.prefixes(animals.labels) == [("cat", "cat fish")]


def test_a_prompt_written_out(animals):
    (shot,) = draw_shots(animals, 1)
    texts = [example.pieces[0] for example in shot]
    names = label_names(animals, "semantic")
    assert head(animals, [shot], names, NEWLINE) == (
        f"Give each text its label.\n{texts[0]}\nlabel: cat\n{texts[1]}\nlabel: cat fish\n{texts[2]}\nlabel: dog\n"
        f"{texts[3]}\nlabel: owl\n"
    )
    assert head(animals, [shot], names, SPACE) == (
        f"Give each text its label. {texts[0]} label: cat {texts[1]} label: cat fish {texts[2]} label: dog "
        f"{texts[3]} label: owl "
    )
    assert opened(shot[0], NEWLINE) == f"{texts[0]}\nlabel:"
    assert terminator(animals, [shot], NEWLINE) == "\n" and terminator(animals, [shot], SPACE) == " text:"
    assert [form.name for form in FORMS] == ["newline, in order", "newline, shuffled", "space, in order", "space, shuffled"]


def test_shuffling_is_within_a_shot_and_fewer_shots_are_the_first_of_more(animals):
    names = label_names(animals, "semantic")
    shots = draw_shots(animals, 3)
    assert draw_shots(animals, 2) == shots[:2]
    assert all([example.label for example in shot] == list(animals.labels) for shot in shots)
    lines = head(animals, shots, names, NEWLINE_SHUFFLED).splitlines()[2::2]
    found = [line.removeprefix("label: ") for line in lines]
    for shot in range(3):
        assert sorted(found[4 * shot : 4 * shot + 4]) == list(animals.labels)
    assert found != list(animals.labels) * 3
    with pytest.raises(ConfigError, match="has 9 examples of 'cat' to show: ask for at most so many --shots"):
        draw_shots(animals, 10)


def test_anonymous_labels(animals):
    names = label_names(animals, "anonymous")
    assert sorted(names.values()) == ["class_00", "class_01", "class_02", "class_03"]
    assert names == label_names(animals, "anonymous")
    assert any(label_names(animals, "anonymous", seed) != names for seed in range(1, 5))


class Reader:
    """Knows the label (the first word of a text, or the class that a shown text of that kind has), or guesses."""

    def __init__(self, knows):
        self.knows, self.asked, self.held = knows, 0, []

    def count(self, text):
        return len(text.split())

    def hold(self, text):
        self.held.append(text)

    def choose(self, prompt, endings):
        self.asked += 1
        if not self.knows:
            return [-((7 * self.asked + 3 * place) % len(endings)) for place in range(len(endings))]
        what = prompt.rpartition("text: ")[2].split(" number")[0]
        lines = prompt.rpartition("text: ")[0].split(f"text: {what} number")[1]
        label = lines.split("label: ")[1]
        return [0.0 if label.startswith(ending[1:]) else -5.0 - len(ending) for ending in endings]


@pytest.mark.parametrize("kind", ["semantic", "anonymous"])
def test_an_oracle_scores_100_and_a_guesser_chance(tmp_path, animals, kind):
    with Journal(tmp_path) as journal:
        oracle = Reader(True)
        (row,) = suite.measure(animals, kind, [2], 12, oracle, journal, "oracle")
        assert row["mean"] == row["best"]["score"] == 100.0 and row["items"] == 12 and row["chance"] == 25.0
        assert len(row["forms"]) == 4 and row["mean_interval"] == row["best"]["interval"]
        assert oracle.asked == 48 and len(oracle.held) == 4  # the examples are read once a form
        (guesser,) = suite.measure(animals, kind, [2], 12, Reader(False), journal, "guesser")
        assert 10 <= guesser["mean"] <= 45
        assert guesser["mean_interval"][0] < 25 < guesser["mean_interval"][1]
        again = Reader(True)
        assert suite.measure(animals, kind, [2], 12, again, journal, "oracle") == [row] and again.asked == 0


def test_without_shots_there_are_two_forms(tmp_path, animals):
    with Journal(tmp_path) as journal:
        none, one = suite.measure(animals, "semantic", [0, 1], 4, Reader(False), journal, "m")
    assert [form["form"] for form in none["forms"]] == ["newline, in order", "space, in order"]
    assert (none["shots"], one["shots"], len(one["forms"])) == (0, 1, 4)


def test_prompts_with_more_shots_go_on_from_those_with_fewer(tmp_path, animals):
    """1, 2 and 4 shots take little more reading than 4 shots alone."""
    def read(shots):
        reader = ModelReader(tiny(vocab_size=258), Bytes())
        with Journal(tmp_path / str(shots)) as journal:
            suite.measure(animals, "semantic", shots, 1, reader, journal, "m")
        return reader.cursor.tokens_read

    text = len(suite.head_text(animals, "semantic", 4))
    alone, together = read([4]), read([1, 2, 4])
    assert 4 * text < alone < together < alone + 4 * text
    assert together < 1.4 * alone  # apart they would take 7 / 4 of it


def test_queries_are_of_all_classes(animals):
    queries = suite.pick_queries(animals, 8)
    assert sorted(query.label for query in queries) == sorted(list(animals.labels) * 2)
    assert suite.pick_queries(animals, 99) and len(suite.pick_queries(animals, 99)) == 12


def test_a_models_choice_is_that_of_whole_labels(tmp_path, animals):
    """Against plain forward passes over each whole text, end of the label included."""
    model = tiny(vocab_size=258)
    with Journal(tmp_path) as journal:
        queries = suite.pick_queries(animals, 3)
        suite.measure_form(animals, "semantic", 1, NEWLINE, queries, ModelReader(model, Bytes()), journal, "m")
        kept, *records = journal.records.values()
    before = head(animals, draw_shots(animals, 1), label_names(animals, "semantic"), NEWLINE)
    assert kept["head"] == before
    for query, record in zip(queries, records, strict=True):
        prompt = before + opened(query, NEWLINE)
        scores = {label: plainly(model, [BEGIN, *prompt.encode()], list(f" {label}\n".encode()))[0] for label in animals.labels}
        assert record["prediction"] == max(scores, key=scores.get)
        assert record["logprob_answer"] == pytest.approx(scores[query.label], abs=1e-4)


def test_relations_have_tacreds_form(tmp_path):
    def one(words, h, t):
        return {"tokens": words.split(), "h": ["x", "Q1", [h]], "t": ["y", "Q2", [t]]}

    values = {"P1": [one(f"Ann {n} Lee knows Bob .", [0, 1, 2], [4]) for n in range(8)],
              "P2": [one(f"Rome {n} lies in Italy .", [0], [4]) for n in range(8)]}
    (tmp_path / "val_wiki.json").write_text(json.dumps(values))
    (tmp_path / "pid2name.json").write_text(json.dumps({"P1": ["knows", "d"], "P2": ["located in", "d"]}))
    task = datasets.fewrel(tmp_path / "val_wiki.json")
    assert task.labels == ("knows", "located in")
    example = next(example for example in task.asked if example.label == "knows")
    n = example.pieces[0].split()[1]
    assert opened(example, NEWLINE) == f"Ann {n} Lee knows Bob .\nthe relation between Ann {n} Lee and Bob is:"
    assert opened(example, SPACE) == f"Ann {n} Lee knows Bob . the relation between Ann {n} Lee and Bob is:"
    assert terminator(task, draw_shots(task, 1), SPACE) == " Ann"


def test_tacred_as_released(tmp_path):
    """Ends of spans are included; no_relation is no class."""
    def row(n, relation):
        return {"id": n, "token": ["Ann", "Lee", str(n), "works", "for", "the", "Times", "."], "subj_start": 0, "subj_end": 1,
                "obj_start": 6, "obj_end": 6, "relation": relation}

    (tmp_path / "tacred" / "data" / "json").mkdir(parents=True)
    for part, start in (("train", 0), ("dev", 50), ("test", 100)):
        rows = [row(start + n, ("per:employee_of", "no_relation", "org:founded")[n % 3]) for n in range(9)]
        (tmp_path / "tacred" / "data" / "json" / f"{part}.json").write_text(json.dumps(rows))
    task = datasets.tacred(tmp_path / "tacred")
    assert task.labels == ("org:founded", "per:employee_of") and len(task.shown) == len(task.asked) == 6
    assert opened(task.asked[0], NEWLINE) == "Ann Lee 100 works for the Times .\nthe relation between Ann Lee and Times is:"
    (found,) = suite_data.gather(["in-context"], [tmp_path], ["relations"]).classifications
    assert found == task
    (tmp_path / "tacred" / "data" / "json" / "test.json").write_text('[{"relation": "x"}]')
    with pytest.raises(DataError, match="departs from Tacred's layout"):
        datasets.tacred(tmp_path / "tacred")


@pytest.mark.parametrize("names", [("train.txt", "test.txt"), ("train_5500.label", "TREC_10.label")])
def test_trec(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes("NUM:date When was café opened ?\nHUM:ind Who was it ?\n".encode("latin-1"))
    task = datasets.trec(tmp_path)
    assert task.labels == ("human", "number")
    assert opened(task.asked[0], NEWLINE) == "question: When was café opened ?\nasks for:"
    (tmp_path / names[1]).write_text("WHAT is this\n")
    with pytest.raises(DataError, match="line 1 of .* is no question behind its class"):
        datasets.trec(tmp_path)


@pytest.mark.parametrize(("content", "complaint"), [
    ("text,label\n", "holds no rows"),
    ("a,b\nx,y\n", "has the columns a, b: name them text and label"),
    ("text,label\nx,y\nz,y\n", "has 1 label with examples"),
    ("text,label\nx,\n", "row 2 of .* lacks a text or a label"),
    ("text,label\n" + "a,Cat\nb,Cat\na,cat\nb,cat\n", "labels 'Cat' and 'cat', which are one label to a reader"),
    ("text,label\n" + "a,x\na,y\nb,x\nb,y\n", "too few texts with one label .texts that have several labels were left out: 2, such as 'a'"),
    ("text,label\na,x\nb,y\n", "which it shows no example|has 0 label"),
])
def test_bad_csvs(tmp_path, content, complaint):
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(DataError, match=complaint):
        datasets.from_csv(tmp_path / "bad.csv")


def test_other_bad_files(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        datasets.from_csv(tmp_path / "latin.csv")
    (tmp_path / "val_wiki.json").write_text('{"P1": [{"tokens": ["a"]}]}')
    with pytest.raises(DataError, match="departs from FewRel's layout"):
        datasets.fewrel(tmp_path / "val_wiki.json")
    with pytest.raises(DataError, match="cannot be read"):
        datasets.banking77(tmp_path)
    (tmp_path / "labels.txt").write_text("joy\nfear\n")
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text("fine\t0\tid\nhm\t7\tid\n")
    with pytest.raises(DataError, match="line 2 of .* has no label numbers below 2"):
        datasets.goemotions(tmp_path)


def test_marks_within_a_text_divide_no_line(tmp_path):
    """U+2028 and U+0085 are white space of a text; a byte order mark is no part of the first line."""
    (tmp_path / "labels.txt").write_text("joy\nfear\n")
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_bytes("fine\u2028day\t0\tid\r\nhm\x85no\t1\tid\r\n".encode("utf-8-sig"))
    task = datasets.goemotions(tmp_path)
    assert [(one.pieces[0], one.label) for one in task.shown] == [("comment: fine day", "joy"), ("comment: hm no", "fear")]
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("NUM:date When\u2028was it ?\nHUM:ind Who\x85was it ?\n", encoding="utf-8-sig")
    assert [one.pieces[0] for one in datasets.trec(tmp_path).asked] == ["question: When was it ?", "question: Who was it ?"]


def test_a_text_that_is_there_twice_is_not_asked_about_among_its_shots(tmp_path):
    """A file four times over gives the task that it gives once; a text with two labels is in no part of it."""
    rows = [f"a {what} of number {n},{what}" for n in range(8) for what in ("cat", "dog")]
    (tmp_path / "once.csv").write_text("\n".join(["text,label", *rows]))
    (tmp_path / "often.csv").write_text("\n".join(["text,label", *rows * 2, "a  beast,cat", *rows, "a beast,dog", *rows]))
    once, often = (datasets.from_csv(tmp_path / f"{name}.csv") for name in ("once", "often"))
    assert (often.shown, often.asked) == (once.shown, once.asked) and len(once.shown) == 12 and len(once.asked) == 4
    assert not {one.pieces for one in often.shown} & {one.pieces for one in often.asked}
    assert once.notes == ()
    assert often.notes == ("rows that say what an earlier one says were left out: 48",
                           "texts that have several labels were left out: 1, such as 'a beast'")


def test_a_csv_field_beyond_the_readers_limit(tmp_path):
    (tmp_path / "long.csv").write_text("text,label\na,x\n" + "b" * 140_000 + ",y\n")
    with pytest.raises(DataError, match=r"long.csv cannot be read as CSV at line 3 \(field larger than field limit"):
        datasets.from_csv(tmp_path / "long.csv")


def test_wilson_by_hand():
    """8 of 10: the interval printed in textbooks is 0.4902 to 0.9433."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    with pytest.raises(ValueError, match="no proportion"):
        wilson(3, 2)


@needs_data("classification/banking77")
def test_real_files():
    folder = DATA / "classification"
    banking = datasets.banking77(folder / "banking77")
    assert len(banking.labels) == 77 and len(banking.shown) == 10_003 and len(banking.asked) == 3_080
    emotions = datasets.goemotions(folder / "goemotions")
    assert len(emotions.labels) == 28
    relations = datasets.fewrel(folder / "fewrel" / "val_wiki.json")
    assert len(relations.labels) == 16 and len(relations.asked) == 16 * 175 and "mother" in relations.labels
    trec = datasets.trec(folder / "trec")
    assert len(trec.labels) == 6 and len(trec.shown) == 5_452 and len(trec.asked) == 500
    for task in (banking, emotions, relations, trec):
        assert len(draw_shots(task, 16)) == 16

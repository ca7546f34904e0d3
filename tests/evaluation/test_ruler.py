"""RULER's prompts: small cases written out by hand, places and lengths, an oracle and a guesser."""

import json
import random
import re

import pytest

from mmcore.errors import DataError
from mmcore.evaluation.journal import Journal
from mmcore.evaluation.ruler import niah, qa
from mmcore.evaluation.ruler.documents import read_pool
from mmcore.evaluation.ruler.prompt import clean, match_all, match_part
from mmcore.evaluation.ruler.suite import Sources, by_depth, measure
from tests.helpers.real_data import DATA, needs_data


def count(text):
    """A tokenizer that a person can do: words."""
    return len(text.split())


# In words: the instruction twice, "The following ...", "Question:", the question, "Answer:"; a document with its title.
FRAME, EACH = 2 * 20 + 5 + 1 + 8 + 1, 2 + 10


def write(path, values):
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def squad(tmp_path):
    """Two articles of 30 paragraphs; paragraph p of article a says that key a-p opens door p."""
    data = []
    for a in "AB":
        paragraphs = []
        for p in range(30):
            context = f"{a}{p:02} says: the key of room {a}{p:02} is number {a}{1000 + p}."
            asked = {"question": f"Which number has the key of room {a}{p:02}?", "answers": [{"text": f"{a}{1000 + p}", "answer_start": 0}] * 2,
                     "id": f"{a}{p}"}
            never = {"question": "Nothing?", "answers": [], "id": "x", "is_impossible": True}
            paragraphs.append({"context": context, "qas": [asked, never]})
        data.append({"title": a, "paragraphs": paragraphs})
    return read_pool(write(tmp_path / "dev.json", {"version": "2", "data": data}))


@pytest.fixture
def hotpot(tmp_path):
    entries = []
    for e in range(12):
        context = [[f"Title {e}-{p}", [f"First {e}-{p}.", f" Second {e}-{p}."]] for p in range(10)]
        entries.append({"_id": str(e), "question": f"Question {e}?", "answer": f"Second {e}-4", "context": context,
                        "supporting_facts": [[f"Title {e}-4", 1], [f"Title {e}-7", 0]]})
    return read_pool(write(tmp_path / "hotpot.json", entries))


def test_pools(squad, hotpot):
    assert squad.kind == "squad" and len(squad.documents) == 60 and squad.documents == sorted(squad.documents)
    assert len(squad.questions) == 60  # the impossible ones are left out
    first = squad.questions[0]
    assert first.answers == ("A1000", "A1000")  # duplicates stay
    assert squad.documents[first.needed[0]].startswith("A00 says") and len(first.related) == 29
    assert hotpot.kind == "hotpotqa" and len(hotpot.documents) == 120
    assert hotpot.documents[hotpot.questions[0].given[0]] == "Title 0-0\nFirst 0-0. Second 0-0."
    assert [hotpot.documents[place][:9] for place in hotpot.questions[3].needed] == ["Title 3-4", "Title 3-7"]


def test_an_empty_answer_is_none(tmp_path):
    """Every prediction would contain it. A question without another is left out, as one that is marked unanswerable."""
    asked = [{"question": f"{n}?", "answers": [{"text": text} for text in texts]}
             for n, texts in enumerate((["", "Paris"], [""], [" "], ["Rome"]))]
    pool = read_pool(write(tmp_path / "dev.json", {"data": [{"paragraphs": [{"context": "Cities.", "qas": asked}]}]}))
    assert [(one.text, one.answers) for one in pool.questions] == [("0?", ("Paris",)), ("3?", ("Rome",))]
    entries = [{"question": f"{n}?", "answer": answer, "context": [["A", ["b"]]]} for n, answer in enumerate(["", "yes"])]
    (question,) = read_pool(write(tmp_path / "hotpot.json", entries)).questions
    assert (question.text, question.answers) == ("1?", ("yes",))
    with pytest.raises(DataError, match="holds no question that has an answer"):
        read_pool(write(tmp_path / "none.json", entries[:1]))
    with pytest.raises(DataError, match="the answer 7 is no text"):
        read_pool(write(tmp_path / "number.json", [entries[0] | {"answer": 7}]))


def test_a_qa_prompt_written_out():
    line = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    assert qa.render(["one", "two"], "Who?") == (
        f"{line}\n\nThe following are given documents.\n\nDocument 1:\none\n\nDocument 2:\ntwo\n\n{line}\n\nQuestion: Who?"
    )
    assert qa.ANSWER_PREFIX == " Answer:"


def test_published_squad_prompts_follow_the_notes(squad):
    """Each sample is shuffled by Random(42) anew: with 10, 20, 190 documents the first chosen one, the gold paragraph,
    comes out in places 9, 19, 49 (worked out from the generator itself)."""
    for number, slot in ((10, 9), (20, 19), (190, 49)):
        order = list(range(number))
        random.Random(42).shuffle(order)
        assert order.index(0) + 1 == slot
    frame, each = FRAME, EACH
    budget = frame + 20 * each + 32
    prompts = list(qa.prompts(squad, budget, 5, count, published=True))
    assert [prompt.index for prompt in prompts] == [0, 1, 2, 3, 4]
    for prompt in prompts:
        documents = re.findall(r"Document (\d+):\n(\S+) says", prompt.given)
        assert len(documents) == 20 and prompt.tokens == count(prompt.given) == frame + 20 * each
        assert documents[18][1] == f"A{prompt.index:02}"  # the 19th
        # The article's 29 others fill the rest: a sample of them, none of the other article.
        assert {name[0] for _, name in documents} == {"A"}
    # Every document is drawn by one generator seeded with 42: the search's draws come first.
    draw = random.Random(42)
    others = list(squad.questions[0].related)
    number = 10
    draw.sample(others, number - 1)
    low, high = 10, max(20, int(budget / ((frame + 10 * each) / 10) * 3))
    while low <= high:
        middle = (low + high) // 2
        if middle - 1 > len(others):
            rest = [i for i in range(60) if i not in {*squad.questions[0].given, *others}]
            if middle < 60:
                draw.sample(rest, middle - 30)
        else:
            draw.sample(others, middle - 1)
        if frame + each * middle + 32 <= budget:
            number, low = middle, middle + 1
        else:
            high = middle - 1
    chosen = [squad.questions[0].given[0], *draw.sample(others, number - 1)]
    random.Random(42).shuffle(chosen)
    assert prompts[0].text == qa.render([squad.documents[i] for i in chosen], squad.questions[0].text)


def test_published_hotpot_prompts_hold_the_questions_ten(hotpot):
    prompts = list(qa.prompts(hotpot, 400, 3, count, published=True))
    for prompt in prompts:
        titles = set(re.findall(r"Title (\d+)-\d+", prompt.text))
        mine = set(re.findall(rf"Title {prompt.index}-(\d+)", prompt.text))
        assert mine == set(map(str, range(10))) and len(titles) >= 1
        assert prompt.answers == (f"Second {prompt.index}-4",)


def test_published_prompts_longer_than_the_pool_repeat_it(squad):
    (prompt,) = qa.prompts(squad, FRAME + EACH * 90 + 32, 1, count, published=True)
    names = re.findall(r"Document \d+:\n(\S+) says", prompt.given)
    assert len(names) == 90
    order = list(range(90))
    random.Random(42).shuffle(order)
    assert names == [squad.documents[i % 60][:3] for i in order]


def test_the_endless_loop_is_an_error(squad):
    with pytest.raises(DataError, match="the published construction never ends there; leave --ruler-exact out"):
        list(qa.prompts(squad, 120, 2, count, published=True))


@pytest.mark.parametrize("length", [110, 200, 600, 1500])
def test_prompts_fill_their_budget_at_any_length(squad, hotpot, length):
    for pool in (squad, hotpot):
        prompts = list(qa.prompts(pool, length, 30, count))
        assert len(prompts) == min(30, len(pool.questions))
        for prompt in prompts:
            assert prompt.tokens == count(prompt.given) <= length - 32
            assert prompt.tokens > length - 32 - 3 * 12  # a document more would not have fitted
            for place in pool.questions[prompt.index].needed:
                assert prompt.text.count(f":\n{pool.documents[place]}\n\n") == 1


def test_the_gold_document_stands_anywhere(squad):
    depths = [prompt.depth for prompt in qa.prompts(squad, FRAME + 20 * EACH + 32, 60, count)]
    assert len({round(depth, 2) for depth in depths}) > 10
    parts = [sum(part / 5 <= depth < (part + 1) / 5 for depth in depths) for part in range(5)]
    assert min(parts) >= 4, parts


def test_depth_by_hand(squad):
    """The documents are of one length, so the depth of the i-th of n is (i - 1) / n."""
    for prompt in qa.prompts(squad, FRAME + 20 * EACH + 32, 20, count):
        names = re.findall(r"Document \d+:\n(\S+) says", prompt.given)
        gold = squad.documents[squad.questions[prompt.index].needed[0]][:3]
        assert prompt.depth == pytest.approx(names.index(gold) / len(names), abs=0.02)


def test_the_same_seed_draws_the_same_prompts(squad):
    first, again, other = (list(qa.prompts(squad, 300, 9, count, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_too_small_a_budget_is_said(squad):
    with pytest.raises(DataError, match=r"fits into 60 tokens: its shortest prompt takes 99; ask for a greater length"):
        list(qa.prompts(squad, 60, 3, count))


@pytest.mark.parametrize(("content", "complaint"), [
    ("{", "is no JSON"), ("[1]", "neither SQuAD's nor HotpotQA's layout"),
    ('{"data": [{"paragraphs": [{"context": "c"}]}]}', "departs from squad's layout"),
    ('{"data": [{"paragraphs": []}]}', "no question"),
])
def test_bad_files(tmp_path, content, complaint):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(DataError, match=complaint):
        read_pool(tmp_path / "bad.json")


def test_a_needle_prompt_written_out():
    text, prefix = niah._template("numbers", "calm-otter", "HAY", alone=True)
    assert text == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
        "number afterwards.\nHAY\nWhat is the special magic number for calm-otter mentioned in the provided text?"
    )
    assert prefix == " The special magic number for calm-otter mentioned in the provided text is"
    text, prefix = niah._template("uuids", "a, b, and c", "HAY", alone=False)
    assert text.startswith("Some special magic uuids are hidden within") and "quiz you about the uuids" in text
    assert text.endswith("What are all the special magic uuids for a, b, and c mentioned in the provided text?")
    assert prefix == " The special magic uuids for a, b, and c mentioned in the provided text are"
    assert niah._join(["a", "b", "c"]) == "a, b, and c"


ESSAY = [f"word{i}{'.' if i % 9 == 8 else ''}" for i in range(5000)]


@pytest.mark.parametrize("name", niah.TASKS)
def test_needles_are_hidden_whole_and_found_by_an_oracle(name):
    task = niah.TASKS[name]
    prompts = list(niah.prompts(name, 1200, 6, count, ESSAY))
    for prompt in prompts:
        assert prompt.tokens == count(prompt.given) <= 1200 - 128
        assert len(prompt.answers) == task.queries * task.values
        for answer in prompt.answers:
            assert prompt.text.count(f" is: {answer}.") == 1 and answer not in prompt.prefix
            assert re.fullmatch(r"\d{7}" if task.value_kind == "numbers" else r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", answer)
        assert 0 <= prompt.depth <= 1
    assert len({round(prompt.depth, 2) for prompt in prompts}) > 2
    assert list(niah.prompts(name, 1200, 6, count, ESSAY)) == prompts


def test_needles_in_too_short_a_text():
    with pytest.raises(DataError, match="smallest haystack, more than 200: ask for a greater length"):
        list(niah.prompts("niah_single_1", 200, 1, count))


def test_scores_by_hand():
    assert clean("  a\tb\x00c \n") == "a\nb\nc"
    assert match_part("the Answer is PARIS.", ("paris", "London")) == 1.0
    assert match_part("Pari s", ("Paris",)) == 0.0
    assert match_all("1111111 and 3333333", ("1111111", "2222222", "3333333", "4444444")) == 0.5
    assert by_depth([(0.0, 1.0), (0.19, 0.0), (1.0, 1.0), (None, 1.0)]) == [
        {"from": 0.0, "to": 0.2, "items": 2, "score": 50.0}, {"from": 0.2, "to": 0.4, "items": 0, "score": None},
        {"from": 0.4, "to": 0.6, "items": 0, "score": None}, {"from": 0.6, "to": 0.8, "items": 0, "score": None},
        {"from": 0.8, "to": 1.0, "items": 1, "score": 100.0}]


class Oracle:
    """Looks the answer up in the prompt; a rival of it only guesses."""

    def __init__(self, knows=True):
        self.knows = knows
        self.asked = 0

    def count(self, text):
        return count(text)

    def complete(self, prompt, max_new_tokens, enough):
        self.asked += 1
        if not self.knows:
            return " 0000000"
        if "Question: Which number" in prompt:
            room = re.search(r"Question: .*room (\w+)\?", prompt)[1]
            return " " + re.search(rf"room {room} is number (\w+)\.", prompt)[1]
        if "Question: Question" in prompt:
            entry = re.search(r"Question: Question (\d+)\?", prompt)[1]
            return f" It is second {entry}-4, of course"
        keys = re.split(r", and |, ", re.search(r" for (.*) mentioned", prompt[-300:].split("?")[-1])[1])
        return " " + ", ".join(value for key in keys for value in re.findall(rf"for {key} is: (\S+)\.", prompt))


def test_an_oracle_scores_100_and_a_guesser_nothing(tmp_path, squad, hotpot):
    sources = Sources({"qa_1": squad, "qa_2": hotpot}, ESSAY)
    with Journal(tmp_path) as journal:
        for task in ("qa_1", "qa_2", *niah.TASKS):
            right = measure(task, 700, 8, sources, Oracle(), journal, "oracle")
            assert (right["score"], right["items"]) == (100.0, 8), task
            assert sum(part["items"] for part in right["by_depth"]) == 8
            wrong = measure(task, 700, 8, sources, Oracle(knows=False), journal, "guesser")
            assert wrong["score"] == 0.0 and wrong["interval"][0] == 0.0 < wrong["interval"][1]


def test_an_interrupted_measurement_goes_on(tmp_path, squad):
    sources = Sources({"qa_1": squad})

    class Interrupted(Oracle):
        def complete(self, prompt, max_new_tokens, enough):
            if self.asked == 4:
                raise KeyboardInterrupt
            return super().complete(prompt, max_new_tokens, enough)

    with Journal(tmp_path) as journal, pytest.raises(KeyboardInterrupt):
        measure("qa_1", 300, 10, sources, Interrupted(), journal, "m")
    with open(tmp_path / "items.jsonl", "ab") as file:
        file.write(b'{"key": "torn')  # as a crash within a line would leave it
    reader = Oracle()
    with Journal(tmp_path) as journal:
        assert journal.found == 4 and journal.used == 0
        row = measure("qa_1", 300, 10, sources, reader, journal, "m")
        assert journal.used == 4
    assert row["score"] == 100.0 and reader.asked == 6
    with Journal(tmp_path) as journal:
        assert journal.found == 10
        assert measure("qa_1", 300, 10, sources, None_reader(), journal, "m") == row
        assert journal.used == 10
    with Journal(tmp_path) as journal:  # another model: the results that lie there are none of its
        measure("qa_1", 300, 10, sources, Oracle(), journal, "other")
        assert journal.found == 10 and journal.used == 0


def None_reader():
    class Reader:
        def count(self, text):
            return count(text)

    return Reader()


def test_a_journal_is_one_writers(tmp_path):
    from mmcore.errors import ConfigError

    with Journal(tmp_path), pytest.raises(ConfigError, match="another evaluation is writing"):
        Journal(tmp_path)
    (tmp_path / "items.jsonl").write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1 of .* is no result of an evaluation"):
        Journal(tmp_path)


@needs_data("qa/xquad")
def test_real_files():
    squad = read_pool(DATA / "qa/xquad/xquad.en.json")
    assert len(squad.documents) == 240 and len(squad.questions) == 1190
    hotpot = read_pool(DATA / "qa/hotpotqa/hotpotqa_train100_hipporag.json")
    assert len(hotpot.questions) == 100 and all(len(question.given) >= 2 for question in hotpot.questions)
    for pool in (squad, hotpot):
        for prompt in qa.prompts(pool, 1024, 10, count):
            assert prompt.tokens <= 992
            (answer, *_), text = prompt.answers, prompt.text.lower()
            assert answer in ("yes", "no") or answer.lower() in text

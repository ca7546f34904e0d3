"""The stream of ids: chunks, turns, batches, stops, save and load."""

import json
import os
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mmcore.errors import CheckpointError, ConfigError
from mmcore.generation import history as files
from mmcore.generation import sampling
from mmcore.generation.batch import generate_batch
from mmcore.generation.engine import Session, generate
from mmcore.generation.sampling import Sampling
from tests.generation.fakes import FakeModel, FakeState

pytestmark = pytest.mark.usefixtures("ahead")

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8, 9, 7]
SAMPLED = Sampling(0.9, 20, 0.95, seed=5)


def greedy(model, ids, count):
    """The definition: read everything again for each token."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model.advance(torch.tensor([ids]), model.new_state(1)).argmax(-1)))
    return ids[-count:]


def test_greedy_equals_reading_everything_again():
    model = FakeModel()
    assert list(generate(model, PROMPT, max_new_tokens=20)) == greedy(model, PROMPT, 20)


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 100])
def test_chunks_do_not_matter(chunk):
    whole = Session(FakeModel())
    whole.feed(PROMPT)
    session = Session(FakeModel(), chunk=chunk)
    seen = []
    session.feed(PROMPT, lambda done, total: seen.append((done, total)))
    assert list(session.stream(30, SAMPLED)) == list(whole.stream(30, SAMPLED))
    assert seen[-1] == (13, 13) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert max(session.model.passes) <= chunk


def test_turns_equal_reading_everything_again_and_read_nothing_twice():
    model = FakeModel()
    session = Session(model)
    text = []
    for prompt in (PROMPT, [7, 7], [60]):
        session.feed(prompt)
        answer = list(session.stream(9))
        assert answer == greedy(FakeModel(), text + prompt, 9)
        text += prompt + answer
    assert session.history == text
    assert sum(model.passes) == len(text) - 1  # the last id drawn waits for something to come after it
    assert session.length == len(text)


def test_no_pass_is_made_for_an_id_that_nothing_follows():
    model = FakeModel()
    assert len(list(generate(model, PROMPT, max_new_tokens=1))) == 1
    assert model.passes == [13]


def test_leaving_the_stream_and_going_on():
    session = Session(FakeModel())
    session.feed(PROMPT)
    stream = session.stream(20, SAMPLED)
    first = [next(stream) for _ in range(5)]
    stream.close()
    rest = list(session.stream(15, SAMPLED))
    assert first + rest == list(generate(FakeModel(), PROMPT, max_new_tokens=20, temperature=0.9, top_k=20, top_p=0.95,
                                         seed=5))


def test_what_a_consumer_appends_within_a_stream_is_read_before_the_next_id():
    model = FakeModel()
    session = Session(model)
    session.feed(PROMPT)
    stream = session.stream(6)
    first = [next(stream), next(stream)]
    session.append([8, 30])
    rest = list(stream)
    assert rest == greedy(FakeModel(), [*PROMPT, *first, 8, 30], 4)
    assert session.history == [*PROMPT, *first, 8, 30, *rest]
    assert sum(model.passes) == len(session.history) - 1


def test_a_session_reset_within_a_stream_ends_it():
    session = Session(FakeModel())
    session.feed(PROMPT)
    stream = session.stream(6)
    next(stream)
    session.reset()
    with pytest.raises(ConfigError, match="reset within a stream"):
        next(stream)


def test_a_stream_goes_on_with_whatever_the_text_has_become(tmp_path):
    """Ids fed within it, another stream within it, a text that was loaded."""
    session = Session(FakeModel())
    session.feed(PROMPT)
    stream = session.stream(20)
    text = [*PROMPT, next(stream), next(stream)]
    session.feed([8, 30])
    text += [8, 30, next(stream)]
    inner = session.stream(5, SAMPLED)
    text += [next(inner), next(inner)]
    text += [next(stream), next(stream)]
    assert session.history == text
    assert text[-2:] == greedy(FakeModel(), text[:-2], 2)
    other = Session(FakeModel())
    other.feed([9, 9, 4])
    other.save(tmp_path / "other")
    session.load(tmp_path / "other")
    rest = [next(stream), next(stream)]
    assert rest == greedy(FakeModel(), [9, 9, 4], 2) and session.history == [9, 9, 4, *rest]


def test_what_fails_in_the_next_step_takes_no_id_away(monkeypatch, ahead):
    """A Ctrl-C in the draw behind a pass that was made ahead: the id that was read has been given out, and nothing else."""
    session, draws = Session(FakeModel()), []
    session.feed(PROMPT)
    expected = greedy(FakeModel(), PROMPT, 6)

    def draw(self, logits, whole=Session._draw):
        draws.append(0)
        if len(draws) == 4:
            raise KeyboardInterrupt
        return whole(self, logits, Sampling())

    monkeypatch.setattr(Session, "_draw", lambda self, logits, _: draw(self, logits))
    given = []
    with pytest.raises(KeyboardInterrupt):
        for token in session.stream(6):
            given.append(token)
    assert given == expected[:3]
    assert session.history == PROMPT + expected[:3] and session.length == len(PROMPT) + 3
    assert list(session.stream(3)) == expected[3:]


def test_a_session_ahead_has_read_what_it_gives_out(ahead):
    model = FakeModel()
    session = Session(model)
    session.feed(PROMPT)
    stream = session.stream(3)
    read = [len(PROMPT) + ahead, len(PROMPT) + 1 + ahead, len(PROMPT) + 2]  # the last id waits for what comes after it
    for number in read:
        next(stream)
        assert sum(model.passes) == session._state.length == number


def test_a_step_that_cannot_be_taken_back_whole_breaks_the_session(ahead, monkeypatch):
    """And a Ctrl-C in the draw of a step that nobody wants is heard."""
    model = FakeModel()
    if not model.takes_back(None):
        pytest.skip("nothing is asked for unseen")
    free = list(generate(FakeModel(), PROMPT, max_new_tokens=12))
    stop = free[4]
    first = free.index(stop)
    session, draws = Session(model), []
    session.feed(PROMPT)

    def draw(self, logits, sampling, whole=Session._draw):
        draws.append(0)
        if len(draws) == first + 2:
            raise KeyboardInterrupt
        return whole(self, logits, sampling)

    monkeypatch.setattr(Session, "_draw", draw)
    with pytest.raises(KeyboardInterrupt):
        list(session.stream(12, stop_ids={stop}))
    monkeypatch.undo()
    monkeypatch.setattr(sampling, "ASYNCHRONOUS", ("cpu",))
    monkeypatch.setattr(FakeModel, "takes_back", lambda *_: True)
    assert session.history == PROMPT + free[:first] and session.length == len(session.history)
    monkeypatch.setattr(session._state, "take_back", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        list(session.stream(12, stop_ids={stop}))
    with pytest.raises(ConfigError, match="cut off within a token"):
        session.feed([1])


def test_redraws_waste_one_step_at_most(ahead, monkeypatch):
    """Where the words looked at first do not suffice, time after time, steps are no longer asked for unseen."""
    monkeypatch.setattr(sampling, "_FIRST_LOOKS", (1,))
    settings = {"max_new_tokens": 15, "temperature": 3.0, "top_p": 0.99}
    model, taken = FakeModel(), []
    take_back = FakeState.take_back
    monkeypatch.setattr(FakeState, "take_back", lambda state: (taken.append(0), take_back(state)))
    ids = list(generate(model, PROMPT, **settings))
    rows = generate_batch(FakeModel(), [PROMPT, PROMPT], **settings)
    assert rows[0] == ids and len(taken) <= 4
    monkeypatch.setattr(sampling, "ASYNCHRONOUS", ())
    assert list(generate(FakeModel(), PROMPT, **settings)) == ids


def test_a_stop_id_comes_last_and_stays_out_of_the_text():
    free = list(generate(FakeModel(), PROMPT, max_new_tokens=40, temperature=1.0))
    stop = free[10]
    first = free.index(stop)
    session = Session(FakeModel())
    session.feed(PROMPT)
    assert list(session.stream(40, Sampling(1.0), {stop})) == free[: first + 1]
    assert session.history == PROMPT + free[:first]
    model = FakeModel()
    model.stop_ids = (stop,)
    assert list(generate(model, PROMPT, max_new_tokens=40, temperature=1.0)) == free[: first + 1]
    assert list(generate(model, PROMPT, max_new_tokens=40, temperature=1.0, stop_ids=())) == free


@pytest.mark.parametrize("kind", [
    torch.tensor, np.array, lambda ids: list(torch.tensor(ids)), lambda ids: list(np.array(ids)), iter,
    lambda ids: torch.tensor(ids[0]), lambda ids: [*ids, 1 << 40],
], ids=range(7))  # fmt: skip
def test_stop_ids_may_be_tensors_and_arrays(kind):
    free = list(generate(FakeModel(), PROMPT, max_new_tokens=40, temperature=1.0))
    ended = free[: free.index(free[10]) + 1]
    settings = {"max_new_tokens": 40, "temperature": 1.0}
    assert list(generate(FakeModel(), PROMPT, stop_ids=kind([free[10]]), **settings)) == ended
    assert generate_batch(FakeModel(), [PROMPT], stop_ids=kind([free[10]]), **settings) == [ended]


def test_generate_goes_on_from_a_state():
    model = FakeModel()
    state = model.new_state(1)
    first = list(generate(model, PROMPT, max_new_tokens=6, state=state))
    assert state.length == len(PROMPT) + 5
    second = list(generate(model, [first[-1], 8], max_new_tokens=6, state=state))
    assert second == greedy(model, PROMPT + first + [8], 6)
    state = model.new_state(1)
    left_early = generate(model, PROMPT, max_new_tokens=6, state=state)
    for count in range(3):
        next(left_early)
        assert state.length == len(PROMPT) + count  # whatever the device: every id but the last one given out


def test_prompts_of_odd_shapes():
    assert list(generate(FakeModel(), torch.tensor(5), max_new_tokens=3)) == greedy(FakeModel(), [5], 3)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        generate(FakeModel(), torch.zeros(0, 5, dtype=torch.int64), max_new_tokens=3)


@pytest.mark.parametrize("prompt", [
    torch.tensor(PROMPT), torch.tensor([PROMPT]), np.array(PROMPT), np.array([PROMPT], dtype=np.int32),
    list(np.array(PROMPT)),
], ids=range(5))  # fmt: skip
def test_prompts_may_be_tensors_and_arrays(prompt):
    found = list(generate(FakeModel(), prompt, max_new_tokens=np.int64(5), seed=np.uint64(3), top_k=np.int32(7)))
    assert found == greedy(FakeModel(), PROMPT, 5) and all(type(token) is int for token in found)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_batches_of_unequal_prompts_equal_each_alone(chunk):
    prompts = [PROMPT, [5], [9, 9, 9, 9], PROMPT[:7]]
    settings = {"max_new_tokens": 15, "temperature": 0.8, "top_k": 10}
    rows = generate_batch(FakeModel(), prompts, seed=3, chunk=chunk, **settings)
    assert rows == [list(generate(FakeModel(), p, seed=3 + i, **settings)) for i, p in enumerate(prompts)]


def test_rows_of_a_batch_stop_apart():
    prompts = [PROMPT, [5]]
    free = generate_batch(FakeModel(), prompts, max_new_tokens=30, temperature=1.0)
    stop = free[0][4]
    model = FakeModel()
    rows = generate_batch(model, prompts, max_new_tokens=30, temperature=1.0, stop_ids=[stop])
    for row, all_of_it in zip(rows, free, strict=False):
        end = all_of_it.index(stop) + 1 if stop in all_of_it else 30
        assert row == all_of_it[:end]


def test_rows_without_a_token_are_never_drawn():
    model = FakeModel()
    model.classifier_weight.data[50:] *= 30  # the padding rows would win every time
    for settings in ({}, {"temperature": 2.0}, {"temperature": 2.0, "top_k": 60}):
        ids = list(generate(model, PROMPT, max_new_tokens=50, vocab_size=50, **settings))
        assert max(ids) < 50
        rows = generate_batch(model, [PROMPT, [1]], max_new_tokens=50, vocab_size=50, **settings)
        assert max(max(row) for row in rows) < 50
        assert rows[0] == ids


@pytest.mark.parametrize("action, message", [
    (lambda m: generate(m, [], max_new_tokens=3), "the prompt is empty: give at least one token"),
    (lambda m: generate(m, [1, 64], max_new_tokens=3), "token id 64 is not one of the model's 64"),
    (lambda m: generate(m, [-1], max_new_tokens=3), "token id -1 is not one"),
    (lambda m: generate(m, [1.5], max_new_tokens=3), "token id 1.5 is not one"),
    (lambda m: generate(m, [1], max_new_tokens=0), "max_new_tokens is 0: it must be a whole number"),
    (lambda m: generate(m, [1], max_new_tokens=3, top_p=3), "top_p is 3"),
    (lambda m: generate_batch(m, [], max_new_tokens=3), "a prompt is empty"),
    (lambda m: generate_batch(m, [[1], []], max_new_tokens=3), "a prompt is empty"),
    (lambda m: Session(m, chunk=0), "chunk is 0"),
    (lambda m: generate(m, [True], max_new_tokens=3), "token id True is not one"),
    (lambda m: generate(m, torch.tensor([PROMPT, PROMPT]), max_new_tokens=3), "are several texts: give one, or all to mmcore.generation.batch.generate_batch"),
    (lambda m: generate(m, PROMPT, max_new_tokens=3, stop_ids="</s>"), "the stop id '<' is no token id: give whole numbers"),
    (lambda m: generate(m, PROMPT, max_new_tokens=3, stop_ids=5), "stop_ids is 5: give a list"),
    (lambda m: generate_batch(m, [PROMPT], max_new_tokens=3, stop_ids=torch.tensor([1.0])), "the stop id 1.0 is no token id"),
    (lambda m: generate(m, PROMPT, max_new_tokens=3, vocab_size=0), "vocab_size is 0"),
    (lambda m: generate_batch(m, [PROMPT], max_new_tokens=3, vocab_size=-5), "vocab_size is -5"),
], ids=range(16))
def test_bad_calls_are_refused_before_the_model_runs(action, message):
    model = FakeModel()
    with pytest.raises(ConfigError, match=message):
        action(model)
    assert model.passes == []


def test_statistics_count_what_was_read_and_drawn():
    session = Session(FakeModel())
    session.feed(PROMPT)
    list(session.stream(10))
    assert (session.stats.prefill_tokens, session.stats.decode_tokens) == (13, 9)
    session.feed([1, 2])
    assert session.stats.prefill_tokens == 16  # with the last id drawn
    assert session.stats.prefill_rate > 0 and session.stats.decode_rate > 0
    assert session.state_bytes == 64
    json.dumps(session.stats.as_dict())


def test_stopping_while_a_prompt_is_read_loses_nothing():
    session = Session(FakeModel(), chunk=4)

    def stop(done, total):
        if done >= 8:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        session.feed(PROMPT, stop)
    assert session.history == PROMPT and session.length == 13
    session.feed([2])
    assert list(session.stream(9)) == greedy(FakeModel(), PROMPT + [2], 9)


def test_a_pass_cut_off_in_its_middle_is_noticed():
    model = FakeModel()
    session = Session(model)
    session.feed(PROMPT)
    model.advance = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        list(session.stream(5))
    del model.advance
    with pytest.raises(ConfigError, match="cut off within a token: reset it"):
        session.feed([1])
    session.reset()
    session.feed([1])


class TestSavedSessions:
    @pytest.fixture
    def saved(self, tmp_path):
        session = Session(FakeModel())
        session.feed(PROMPT)
        list(session.stream(7, SAMPLED))
        session.save(tmp_path / "talk", {"turns": 1})
        return session, tmp_path / "talk"

    def test_goes_on_token_for_token(self, saved):
        session, path = saved
        model = FakeModel()
        other = Session(model)
        assert other.load(path) == {"turns": 1}
        assert (other.history, other.length, other.stats) == (session.history, session.length, session.stats)
        for chosen in (SAMPLED, Sampling()):
            for it in (session, other):
                it.feed([4, 2])
            assert list(other.stream(12, chosen)) == list(session.stream(12, chosen))
        assert max(model.passes) <= 4  # the history is not read again

    def test_right_after_a_prompt(self, tmp_path):
        session = Session(FakeModel())
        session.feed(PROMPT)
        session.save(tmp_path / "talk")
        other = Session(FakeModel())
        other.load(tmp_path / "talk")
        assert list(other.stream(9)) == list(session.stream(9))

    def test_of_an_empty_text(self, tmp_path):
        Session(FakeModel()).save(tmp_path / "talk")
        other = Session(FakeModel())
        other.feed(PROMPT)
        other.load(tmp_path / "talk")
        assert other.history == []
        other.feed(PROMPT)
        assert list(other.stream(5)) == greedy(FakeModel(), PROMPT, 5)

    def test_is_private_and_leaves_no_traces(self, saved):
        session, path = saved
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        session.save(path)  # a saved session may be replaced
        assert os.listdir(path.parent) == ["talk"]

    def test_does_not_replace_other_files(self, saved):
        session, path = saved
        (path.parent / "thesis.tex").write_text("years of work")
        save_file({"weights": torch.zeros(2)}, path.parent / "model.safetensors")
        for name in ("thesis.tex", "model.safetensors"):
            with pytest.raises(CheckpointError, match="exists and is not a saved session: choose another name"):
                session.save(path.parent / name)
        with pytest.raises(CheckpointError, match="is a folder"):
            session.save(path.parent)
        with pytest.raises(CheckpointError, match="cannot write .*No such file"):
            session.save(path.parent / "nowhere" / "talk")
        assert (path.parent / "thesis.tex").read_text() == "years of work"

    def test_missing_and_foreign_files(self, tmp_path):
        session = Session(FakeModel())
        (tmp_path / "notes").write_text("hello")
        with pytest.raises(CheckpointError, match="there is no saved session .*nothing: check the name"):
            session.load(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match="notes is not a saved session"):
            session.load(tmp_path / "notes")

    def test_every_cut_and_flipped_bit_is_refused(self, saved):
        _, path = saved
        whole = path.read_bytes()
        other = Session(FakeModel())
        other.feed([9])
        for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError):
                other.load(path)
        for at in range(0, len(whole), 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
            with pytest.raises(CheckpointError):
                other.load(path)
        assert other.history == [9]
        path.write_bytes(whole)
        other.load(path)

    @pytest.mark.parametrize("change, message", [
        (lambda m: FakeModel(seed=1), "other weights of the same shape"),
        (lambda m: FakeModel(width=8), r"another model \(hidden_size differ\)"),
        (lambda m: m.double(), "weights in another number format than float64"),
        (lambda m: setattr(m, "knocked_out", frozenset({"long_term"})) or m, "other memories knocked out"),
    ], ids=["weights", "settings", "dtype", "memories"])
    def test_of_another_model_are_refused(self, saved, change, message):
        _, path = saved
        with pytest.raises(CheckpointError, match=message):
            Session(change(FakeModel())).load(path)

    def test_whose_tensors_do_not_fit_are_refused(self, saved):
        """As from a hostile file: the hash is right, the content is not."""
        _, path = saved
        tensors, facts = files.read_session(path)
        for change in (
            {"state.vector": torch.zeros(1, 3)},
            {"state.vector": torch.zeros(1, 16, dtype=torch.float16)},
            {"state.extra": torch.zeros(1)},
            {"history": torch.tensor([64])},
            {"unread": torch.tensor([0.5])},
            {"logits": torch.zeros(3)},
            {"state.length": torch.zeros(3)},
        ):
            files.write_session(path, tensors | change, facts)
            with pytest.raises(CheckpointError, match="holds no session that this model can go on from"):
                Session(FakeModel()).load(path)

    def test_whose_facts_do_not_fit_are_refused(self, saved):
        _, path = saved
        tensors, facts = files.read_session(path)
        bad_stats = ({"stats": {"speed": 1}}, {"stats": {"prefill_tokens": "many"}})
        for change in ({"model": {}}, {"model": 3}, {"extra": None}, *bad_stats):
            files.write_session(path, tensors, facts | change)
            with pytest.raises(CheckpointError, match="saved|holds no session"):
                Session(FakeModel()).load(path)

    def test_holds_no_code(self, saved):
        _, path = saved
        with safe_open(path, framework="pt") as handle:
            assert sorted(handle.metadata()) == ["facts", "format", "sha256"]
            json.loads(handle.metadata()["facts"])

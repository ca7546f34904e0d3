"""The same promises with the real architectures: decoding equals the full forward pass, saved memories go on."""

import pytest
import torch

from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError
from mmcore.generation import history as files
from mmcore.generation.batch import generate_batch
from mmcore.generation.engine import Session, generate
from mmcore.generation.sampling import Sampling
from mmcore.model import build_model

PROMPT = [(7 * i * i + 3) % 96 for i in range(23)]  # longer than the short-term window and the delay
HOT = Sampling(1.2, top_p=0.98, seed=4)


@pytest.fixture(params=["memory_mosaics_v2", "llama", "long_short_transformer"], scope="module")
def model(request):
    config = ModelConfig(model_type=request.param, vocab_size=96, hidden_size=32, intermediate_size=48,
                         num_hidden_layers=2, num_attention_heads=2, short_term_window=8, long_term_delay=4,
                         long_term_delay_range=(4, 8), max_position_embeddings=64)
    model = build_model(config).eval()
    model.init_weights(3)
    with torch.no_grad():
        model.classifier_weight.mul_(20)  # far from ties
    return model


def test_greedy_equals_the_full_forward_pass(model):
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(20):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert list(generate(model, PROMPT, max_new_tokens=20)) == ids[len(PROMPT) :]


@pytest.mark.parametrize("chunk", [1, 7])
def test_batches_of_unequal_prompts_equal_each_alone(model, chunk):
    prompts = [PROMPT, PROMPT[:2], PROMPT[:12]]
    settings = {"max_new_tokens": 12, "temperature": 1.2, "top_k": 30}
    rows = generate_batch(model, prompts, chunk=chunk, **settings)
    assert rows == [list(generate(model, prompt, seed=i, **settings)) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("chunk", [2, 100])
def test_turns_equal_reading_everything_again(model, chunk):
    session, text = Session(model, chunk=chunk), []
    for prompt in (PROMPT, [5], PROMPT[:11]):
        session.feed(prompt)
        text += prompt
        answer = list(session.stream(9))
        assert answer == list(generate(model, text, max_new_tokens=9))
        text += answer


@pytest.mark.parametrize("before", [0, 1, 12])
def test_what_is_left_while_it_is_read_can_be_forgotten(model, before, monkeypatch):
    """Between two pieces, and where a pass of the model is cut off."""
    session, other = Session(model, chunk=7), Session(model)
    for one in (session, other):
        if before:
            one.feed(PROMPT[:before])
            list(one.stream(3))
    mark = session.mark()

    def stop(*_):
        raise InterruptedError

    advance = model.advance
    for options in ({"progress": stop}, {}):
        with monkeypatch.context() as patched, pytest.raises(InterruptedError):
            if not options:
                patched.setattr(model, "advance", lambda tokens, state: stop(advance(tokens, state)))
            session.feed(PROMPT, **options)
        session.rewind(mark)
    assert session.history == other.history and session.length == other.length
    for one in (session, other):
        one.feed([5, 6])
    assert list(session.stream(12, HOT)) == list(other.stream(12, HOT))


@pytest.mark.parametrize("read", [0, 1, 2, 9, 23])
def test_saved_memories_go_on_token_for_token(model, tmp_path, read):
    session, other = Session(model), Session(model)
    if read:
        session.feed(PROMPT[:read])
        list(session.stream(5, HOT))
    session.save(tmp_path / "talk")
    other.load(tmp_path / "talk")
    for it in (session, other):
        it.feed([4, 2])
    assert list(other.stream(30, HOT)) == list(session.stream(30, HOT))
    assert other.state_bytes == session.state_bytes > 0


def test_tensors_of_another_shape_are_refused(model, tmp_path):
    session = Session(model)
    session.feed(PROMPT)
    session.save(tmp_path / "talk")
    tensors, facts = files.read_session(tmp_path / "talk")
    name = next(name for name in tensors if name.endswith(".keys"))
    for change in (tensors[name][..., :-1], tensors[name].repeat(2, 1, 1, 1), tensors[name].double()):
        files.write_session(tmp_path / "talk", tensors | {name: change.contiguous()}, facts)
        with pytest.raises(CheckpointError, match="holds no session that this model can go on from"):
            Session(model).load(tmp_path / "talk")
    del tensors[name]
    files.write_session(tmp_path / "talk", tensors, facts)
    with pytest.raises(CheckpointError, match="it lacks or adds"):
        Session(model).load(tmp_path / "talk")


def test_memories_knocked_out_can_be_saved(tmp_path):
    config = ModelConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, short_term_window=8, long_term_delay=4, long_term_delay_range=(4, 8))
    model = build_model(config).eval()
    model.init_weights(0)
    whole = Session(model)
    whole.feed(PROMPT)
    whole.save(tmp_path / "whole")
    model.without(("long_term",))
    session, other = Session(model), Session(model)
    session.feed(PROMPT)
    session.save(tmp_path / "talk")
    other.load(tmp_path / "talk")
    assert list(other.stream(10, HOT)) == list(session.stream(10, HOT))
    with pytest.raises(CheckpointError, match="saved with other memories knocked out"):
        other.load(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model_type", ["memory_mosaics_v2", "llama"])
@pytest.mark.parametrize("sampling", [Sampling(), HOT, Sampling(1.2, 30), Sampling(2.0, top_p=0.9999)], ids=range(4))
def test_sessions_on_a_gpu_draw_the_same_ahead_and_in_turn(model_type, sampling):
    """In fp32, with a vocabulary that is sorted only in part; turns, streams left early and stops, and rows of a batch."""
    config = ModelConfig(model_type=model_type, vocab_size=4096, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=2, short_term_window=8, long_term_delay=4, long_term_delay_range=(4, 8),
                         max_position_embeddings=256)  # fmt: skip
    model = build_model(config).eval()
    model.init_weights(3)
    with torch.no_grad():
        model.classifier_weight.mul_(20)
    model.to("cuda")

    def talk(ahead):
        session, said = Session(model, ahead=ahead), []
        for turn in range(3):
            session.feed(PROMPT)
            stream = session.stream(30, sampling)
            said += [next(stream) for _ in range(12 + turn)]
            stream.close()
            said += list(session.stream(30, sampling, {said[3]}))
        return said, session.history, session.length

    assert talk(True) == talk(False)
    settings = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    rows = generate_batch(model, [PROMPT, PROMPT[:7]], max_new_tokens=20, seed=sampling.seed, **settings)
    for i, prompt in enumerate((PROMPT, PROMPT[:7])):
        assert rows[i] == list(generate(model, prompt, max_new_tokens=20, seed=sampling.seed + i, **settings))

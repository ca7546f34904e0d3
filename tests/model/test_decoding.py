"""Decoding from a state equals the full forward pass, token for token."""

import pytest
import torch

from tests.helpers.models import random_tokens, tiny

TYPES = ["memory_mosaics_v2", "llama", "long_short_transformer"]


def feed(model, state, tokens, sizes):
    """Logits [B, T, V] after every token, fed in pieces of the given sizes."""
    pieces = tokens.split(sizes, dim=1)
    return torch.cat([model.advance(piece, state, last_only=False) for piece in pieces], dim=1)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("sizes", [
    [1] * 60, [60], [7] * 8 + [4], [1, 59], [59, 1], [13, 1, 1, 20, 1, 24], [2] * 30,
], ids=lambda sizes: "-".join(map(str, sizes[:4])))
def test_pieces_of_any_size_equal_the_whole(model_type, sizes):
    """60 tokens go past the short window h = 9 and the delay m = 5 several times over."""
    model = tiny(model_type)
    tokens = random_tokens(3, 60)
    with torch.no_grad():
        whole = model(tokens)
    state = model.new_state(3)
    assert torch.allclose(feed(model, state, tokens, sizes), whole, atol=3e-5)
    assert state.length == 60


def test_a_long_run_in_float64_is_exact():
    model = tiny(kernels="reference").double()
    tokens = random_tokens(1, 150)
    with torch.no_grad():
        whole = model(tokens)
    assert torch.allclose(feed(model, model.new_state(1), tokens, [40] + [1] * 110), whole, atol=1e-11)


@pytest.mark.parametrize("model_type", TYPES)
def test_rows_of_unequal_length_equal_each_row_alone(model_type):
    model = tiny(model_type)
    lengths = [31, 1, 12, 24]
    rows = [random_tokens(1, n + 15, seed=n) for n in lengths]
    longest = max(lengths)
    padding = torch.tensor([longest - n for n in lengths])
    batch = torch.zeros(4, longest + 15, dtype=torch.int64)
    for b, row in enumerate(rows):
        batch[b, padding[b] :] = row[0]
    state = model.new_state(4, padding=padding)
    got = feed(model, state, batch, [10, longest - 10] + [1] * 15)
    with torch.no_grad():
        for b, row in enumerate(rows):
            assert torch.allclose(got[b, padding[b] :], model(row)[0], atol=3e-5), f"row {b}"


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("cut", [1, 2, 5, 9, 10, 33])
def test_a_saved_state_goes_on_as_the_unbroken_one(model_type, cut):
    model = tiny(model_type)
    tokens = random_tokens(2, 50)
    unbroken = model.new_state(2)
    feed(model, unbroken, tokens[:, :cut], [cut])
    saved = {name: tensor.clone() for name, tensor in unbroken.tensors().items()}
    restored = model.new_state(2)
    restored.load(saved)
    rest = tokens[:, cut:]
    sizes = [3] + [1] * (rest.shape[1] - 3)
    assert torch.equal(feed(model, unbroken, rest, sizes), feed(model, restored, rest, sizes))


def test_the_short_term_state_stays_small_and_the_long_term_grows():
    model = tiny()
    state = model.new_state(1)
    sizes = []
    for _ in range(20):
        model.advance(random_tokens(1, 50), state)
        sizes.append({name: memory.store.used for name, memory in state.memories.items()})
    assert all(sizes[-1][name] < 120 for name in sizes[-1] if "short" in name)
    assert all(sizes[-1][name] == 999 for name in sizes[-1] if "long" in name)


def test_last_only_is_the_last_of_all():
    model = tiny()
    tokens = random_tokens(2, 17)
    assert torch.allclose(
        model.advance(tokens, model.new_state(2)), model.advance(tokens, model.new_state(2), last_only=False)[:, -1],
        atol=1e-5)


@pytest.mark.parametrize("memory", ["short_term", "long_term"])
def test_decoding_without_a_memory_equals_the_pass_without_it(memory):
    model = tiny().without((memory,))
    tokens = random_tokens(1, 40)
    with torch.no_grad():
        assert torch.allclose(feed(model, model.new_state(1), tokens, [11] + [1] * 29), model(tokens), atol=3e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 50},
                                   {"hidden_size": 256, "num_attention_heads": 2, "intermediate_size": 300}])
def test_the_compiled_step_equals_the_equations(threads, dtype, sizes):
    """One row, one token at a time, past the window and the delay, against the float64 reference over the whole."""
    from mmcore.kernels import native
    if native.why_not():
        pytest.skip(native.why_not())
    model = tiny(**sizes).to(dtype)
    exact = tiny(kernels="reference", **sizes).to(dtype).double()
    tokens = random_tokens(1, 90)
    with torch.no_grad():
        whole = exact(tokens)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        state = model.new_state(1)
        got = feed(model, state, tokens, [4] + [1] * 86)
        assert state.whole_step, "the compiled step was not taken"
    finally:
        torch.set_num_threads(before)
    assert (got.double() - whole).abs().max() < 2e-4 * whole.abs().max()


def test_the_compiled_step_and_the_layers_one_by_one_share_a_state():
    model = tiny()
    tokens = random_tokens(1, 60)
    with torch.no_grad():
        whole = model(tokens)
    state = model.new_state(1)
    first = feed(model, state, tokens[:, :30], [10] + [1] * 20)
    state.whole_step = False
    middle = feed(model, state, tokens[:, 30:45], [1] * 15)
    state.whole_step = None
    last = feed(model, state, tokens[:, 45:], [3] + [1] * 12)
    assert torch.allclose(torch.cat([first, middle, last], 1), whole, atol=3e-5)

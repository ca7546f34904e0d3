"""What a program around the model may do: other defaults of torch, other rows, empty batches, vocabularies of two lengths."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmcore.config import ModelConfig
from mmcore.model import build_model

CONFIG = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     short_term_window=8, long_term_delay=5, long_term_delay_range=(5, 8))  # fmt: skip
FORMS = ["auto", "blocked"]


def model(kernels="auto"):
    built = build_model(CONFIG, kernels)
    built.init_weights(0)
    return built.eval()


def words(*shape):
    return torch.randint(0, CONFIG.vocab_size, shape)


def everything(built, ids):
    """Logits, a loss with its gradients, and logits of a prompt and of single tokens."""
    loss = built.loss(ids[:, :-1], ids[:, 1:])
    grads = torch.autograd.grad(loss, list(built.parameters()))
    state = built.new_state(len(ids))
    with torch.no_grad():
        read = [built.advance(ids[:, :20], state), *(built.advance(ids[:, t : t + 1], state) for t in range(20, 24))]
    return [built(ids), loss, *grads, *read]


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, "meta"], ids=str)
@pytest.mark.parametrize("kernels", FORMS)
def test_the_default_dtype_and_device_change_nothing(kernels, kind):
    built, ids = model(kernels), words(2, 40)
    before = everything(built, ids)
    if kind == "meta":
        with torch.device("meta"):
            after = everything(built, ids)
    else:
        torch.set_default_dtype(kind)
        try:
            after = everything(built, ids)
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("kernels", [*FORMS, "reference"])
def test_other_rows_than_the_states_are_refused_and_change_nothing(kernels):
    built, ids = model(kernels), words(4, 30)
    state = built.new_state(2)
    built.advance(ids[:2, :20], state)
    for wrong in (ids[:, :1], ids[:1, :1], ids[:, :3], ids[:2, :0]):
        with pytest.raises(ValueError, match=r"advance got tokens \(\d, \d\) for a state of 2 rows"):
            built.advance(wrong, state)
    assert state.length == 20
    assert torch.allclose(built.advance(ids[:2, 20:21], state), built(ids[:2, :21])[:, -1], atol=1e-5)
    with pytest.raises(ValueError, match="new_state got a batch of 0 rows"):
        built.new_state(0)


@pytest.mark.parametrize("padding", [torch.tensor([7, 0]).int(), torch.tensor([[7, 9], [0, 9]])[:, 0], torch.tensor([5]).expand(2)],
                         ids=["int32", "column", "expanded"])  # fmt: skip
def test_padding_of_any_layout(padding):
    built, ids = model(), words(2, 24)
    found = []
    for given in (padding, padding.clone().long()):
        state = built.new_state(2, given)
        found.append([built.advance(ids[:, :20], state), *(built.advance(ids[:, t : t + 1], state) for t in range(20, 24))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_padding_that_is_none():
    for wrong in (torch.zeros(3).int(), torch.zeros(2, 1).int(), torch.zeros(2)):
        with pytest.raises(ValueError, match="new_state got padding"):
            model().new_state(2, wrong)


@pytest.mark.parametrize("rows", [80, 50])
def test_a_classifier_of_another_length_than_the_embedding(rows):
    built, ids = model(), words(1, 20)
    built.lm_head.weight = nn.Parameter(torch.randn(rows, CONFIG.hidden_size))
    state = built.new_state(1)
    built.advance(ids, state)
    for beyond in (64, 79):
        with pytest.raises(IndexError, match="is not one of 64"):
            built.advance(torch.tensor([[beyond]]), state)
    last = torch.tensor([[63]])
    assert torch.allclose(built.advance(last, state), built(torch.cat([ids, last], 1))[:, -1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", [*FORMS, "reference"])
def test_an_empty_batch(kernels, dtype):
    built = model(kernels).to(dtype)
    assert built(words(0, 40)).shape == (0, 40, CONFIG.vocab_size)


def test_a_step_that_is_looked_at_shows_its_products():
    """It is one call of C otherwise, in which nobody sees any; the state may go either way from token to token."""
    built, ids = model(), words(2, 23)
    seen, unseen = built.new_state(2), built.new_state(2)
    counts = []
    for piece in ids.split([20, 1, 1, 1], dim=1):
        with FlopCounterMode(display=False) as counter:
            logits = built.advance(piece, seen)
        counts.append(counter.get_total_flops())
        assert torch.allclose(logits, built.advance(piece, unseen), atol=1e-5)
        built.advance(piece[:, :1], seen)
        built.advance(piece[:, :1], unseen)
    unseen.whole_step = SimpleNamespace(takes_back=True)
    with FlopCounterMode(display=False):
        assert not built.takes_back(unseen), "no step will have been that could be taken back"
    assert built.takes_back(unseen)
    weights = sum(p.numel() for p in built.parameters() if p.dim() == 2) - built.model.embed_tokens.weight.numel()
    assert counts[0] > counts[1] > 2 * 2 * weights - 1

"""Accumulated gradients equal those of the whole batch; a step that is not finite changes nothing."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from mmcore.config import ModelConfig, TrainingConfig
from mmcore.distributed.mesh import World
from mmcore.errors import NonFiniteError
from mmcore.model import build_model
from mmcore.training.faults import Faults
from mmcore.training.step import StepResult, accumulate, clip, what_is_not_finite

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    short_term_window=8, long_term_delay=3, long_term_delay_range=(3, 8), max_position_embeddings=32,
)  # fmt: skip


@dataclass
class Micro:
    tokens: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor


def data(rows=6, time=21):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 50, (rows, time + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    # rows differ in how many labels they keep: a mean of means would be wrong
    for row in range(rows):
        labels[row, : 3 * row] = -100
    documents = torch.zeros(rows, time, dtype=torch.int32)
    documents[:, 10:] = 1
    return tokens[:, :-1].contiguous(), labels, documents


def model():
    built = build_model(CONFIG)
    built.init_weights(0)
    return built


def gradients(sizes, network=None):
    network = network or model()
    parts = data()
    batches, start = [], 0
    for size in sizes:
        batches.append(Micro(*(part[start : start + size] for part in parts)))
        start += size
    network.zero_grad()
    result = accumulate(network, batches, 5, torch.device("cpu"), "fp32", World())
    return result, {name: p.grad.clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("sizes", [(3, 3), (1, 2, 3), (1, 1, 1, 1, 1, 1), (5, 1)])
def test_accumulation_equals_the_whole_batch(sizes):
    whole, expected = gradients((6,))
    result, found = gradients(sizes)
    assert result.trained_tokens == whole.trained_tokens == int((data()[1] != -100).sum())
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert result.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_loss_and_norm_from_their_definitions():
    network = model()
    tokens, labels, documents = data()
    logits = network(tokens, documents, delay=5).double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    result, grads = gradients((2, 4), network)
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    norm = math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads.values()))
    assert result.gradient_norm == pytest.approx(norm, rel=1e-5)


def test_clipping_scales_the_whole_gradient_and_never_up():
    network = model()
    result, before = gradients((6,), network)
    clip(network, result.gradient_norm, result.gradient_norm / 4)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, before[name] / 4)
    clip(network, 0.1, 1.0)
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, before[name] / 4)


def test_a_step_without_labels_is_zero_and_finite():
    network = model()
    tokens, labels, documents = data()
    batch = Micro(tokens, torch.full_like(labels, -100), documents)
    result = accumulate(network, [batch], 5, torch.device("cpu"), "fp32", World())
    assert (result.loss, result.gradient_norm, result.trained_tokens) == (0.0, 0.0, 0)


def refusal(result, samples=range(40, 46), checkpoint=None):
    faults = Faults(TrainingConfig(), World())
    with pytest.raises(NonFiniteError) as caught:
        faults.skip(7, faults.what_is_not_finite(result, model(), samples, samples), samples, checkpoint, 3e-4)
    return str(caught.value)


def test_the_sentence_names_step_samples_checkpoint_and_remedies():
    text = refusal(StepResult(math.nan, math.nan, 9, (1.0, math.nan, 1.0)), checkpoint=Path("run/checkpoints/step-000006"))
    for part in ("step 7 ", "before its update", "nan", "samples 42-43", "step-000006", "training.learning_rate", "0.0003"):
        assert part in text
    assert "\n" not in text


def test_the_samples_of_uneven_micro_batches():
    network = model()
    found, plain = [], network.loss
    for poisoned in (0, 1):
        calls = []
        network.loss = lambda *rest, calls=calls, at=poisoned, **keys: calls.append(0) or (
            plain(*rest, **keys) * (math.nan if len(calls) == at + 1 else 1.0))  # fmt: skip
        result, _ = gradients((4, 2), network)
        found.append(what_is_not_finite(result, network, range(40, 46), range(40, 46)))
    assert found == ["the loss is nan on samples 40-43", "the loss is nan on samples 44-45"]


def test_the_remedies_are_those_that_are_left():
    bad = StepResult(math.nan, math.nan, 9, (math.nan,))
    assert "training.on_nonfinite=skip passes over them" in refusal(bad)
    faults = Faults(TrainingConfig(on_nonfinite="skip", max_skipped_steps=2), World())
    faults.skip(6, "nan", range(6), None, 3e-4)
    with pytest.raises(NonFiniteError, match="go on with --resume.*training.max_skipped_steps may allow more") as caught:
        faults.skip(7, "nan", range(6), None, 3e-4)
    assert "on_nonfinite" not in str(caught.value)


def test_a_gradient_alone_names_all_samples_and_a_parameter():
    network = model()
    gradients((6,), network)
    network.lm_head.weight.grad[3, 4] = math.inf
    found = what_is_not_finite(StepResult(1.0, math.inf, 9, (1.0,)), network, range(40, 43), range(40, 46))
    assert found == "the gradient norm is inf (first in lm_head.weight) on samples 40-45"
    network.lm_head.weight.grad[3, 4] = 0
    assert "though every part is finite" in refusal(StepResult(1.0, math.inf, 9, (1.0,)))


def test_finite_steps_pass():
    good = StepResult(1.0, 2.0, 9, (1.0,))
    assert good.is_finite and what_is_not_finite(good, model(), range(3), range(3)) is None
    assert not StepResult(math.nan, 2.0, 9, (1.0,)).is_finite and not StepResult(1.0, math.inf, 9, (1.0,)).is_finite

"""AdamW against its definition; weight decay; the state under names and back."""

import pytest
import torch
from torch import nn

from mmcore.config import TrainingConfig
from mmcore.errors import CheckpointError
from mmcore.training.optimizer import (
    build_optimizer,
    load_optimizer,
    optimizer_steps,
    optimizer_tensors,
    set_learning_rate,
)

SETTINGS = TrainingConfig(learning_rate=1e-2, weight_decay=0.1, adam_eps=1e-8)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3))


def train(model, optimizer, steps, seed=1, rate=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if rate:
            set_learning_rate(optimizer, rate)
        optimizer.step()


def test_equals_adamw_written_out_in_float64():
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 6):
        for name, p in model.named_parameters():
            g = torch.randn(p.shape, generator=generator).double()
            if p.ndim >= 2:
                expected[name] *= 1 - 1e-2 * 0.1
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            corrected = (second[name] / (1 - 0.95**step)).sqrt() + 1e-8
            expected[name] -= 1e-2 * first[name] / (1 - 0.9**step) / corrected
    train(model, optimizer, 5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_decay_on_matrices_only():
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {"0.weight", "1.weight"}


def test_state_goes_through_names_and_back_to_the_last_bit():
    model, other = small_model(), small_model()
    optimizer = build_optimizer(model, SETTINGS)
    train(model, optimizer, 3)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert set(saved) == {f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n, _ in model.named_parameters()}
    other.load_state_dict(model.state_dict())
    restored = build_optimizer(other, SETTINGS)
    load_optimizer(other, restored, saved, optimizer_steps(model, optimizer))
    train(model, optimizer, 2, seed=9, rate=3e-3)
    train(other, restored, 2, seed=9, rate=3e-3)
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_parameter_without_gradients_keeps_its_own_count():
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    train(model, optimizer, 2)
    model[2].weight.grad = None
    optimizer.step()
    assert optimizer_steps(model, optimizer) == {"*": 3, "2.weight": 2}


def test_a_state_of_another_shape_is_refused():
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    train(model, optimizer, 1)
    saved = optimizer_tensors(model, optimizer)
    saved["exp_avg_sq.1.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"exp_avg_sq.1.weight has shape \[2, 2\] where the model has \[3, 4\]"):
        load_optimizer(model, build_optimizer(model, SETTINGS), saved, {"*": 1})


def test_going_back_to_before_the_first_update_forgets_the_moments():
    model = small_model()
    optimizer = build_optimizer(model, SETTINGS)
    before = optimizer_steps(model, optimizer)
    train(model, optimizer, 2)
    load_optimizer(model, optimizer, {}, before)
    assert before == optimizer_steps(model, optimizer) == {"*": 0} and not optimizer_tensors(model, optimizer)

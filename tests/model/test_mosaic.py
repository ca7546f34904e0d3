"""The whole model against float64 loops from the equations, and the properties that must hold of it."""

import pytest
import torch

from tests.helpers import paper_loops
from tests.helpers.models import random_tokens, tiny

# One document; several with lengths 1, 2, around h = 9 and m = 5; a row whose length is odd and prime.
PACKINGS = {
    "one": [0] * 23,
    "packed": [0] + [1] * 2 + [2] * 5 + [3] * 6 + [4] * 9 + [5] * 10 + [6] * 4,
    "single": [0],
    "lengths_of_one": [0, 1, 2, 3, 4],
}


def run_loops(model, tokens, documents, **options):
    config = model.config
    return paper_loops.logits(
        options.pop("weights", None) or paper_loops.exact_weights(model), tokens, documents,
        heads=config.num_attention_heads, layers=config.num_hidden_layers, window=config.short_term_window,
        delay=options.pop("delay", config.long_term_delay), eps=config.rms_norm_eps, **options,
    )


@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize(("kernels", "dtype", "tolerance"), [
    ("reference", torch.float64, 1e-10), ("auto", torch.float32, 2e-4), ("blocked", torch.float32, 2e-4),
])
def test_logits_equal_the_equations(name, kernels, dtype, tolerance):
    model = tiny(kernels=kernels).to(dtype)
    documents = PACKINGS[name]
    tokens = random_tokens(1, len(documents))
    expected = run_loops(model, tokens[0].tolist(), documents)
    got = model(tokens, documents=torch.tensor([documents]))
    assert (got[0].double() - expected).abs().max() < tolerance
    if len(set(documents)) == 1:
        assert torch.equal(model(tokens), got)


@pytest.mark.parametrize("kernels", ["reference", "auto", "blocked"])
def test_gradients_equal_the_equations(kernels):
    dtype = torch.float64 if kernels == "reference" else torch.float32
    model = tiny(kernels=kernels).to(dtype)
    documents = PACKINGS["packed"]
    tokens = random_tokens(1, len(documents) + 1)
    labels = tokens[0, 1:].tolist()
    labels[3] = -100
    weights = paper_loops.exact_weights(model, requires_grad=True)
    expected = paper_loops.cross_entropy(
        run_loops(model, tokens[0, :-1].tolist(), documents, weights=weights, delay=7), labels)
    expected.backward()
    loss = model.loss(tokens[:, :-1], torch.tensor([labels]), torch.tensor([documents]), delay=7)
    loss.backward()
    assert abs(loss.item() - expected.item()) < (1e-9 if dtype == torch.float64 else 2e-3)
    for parameter_name, parameter in model.named_parameters():
        reference = weights[parameter_name].grad
        error = (parameter.grad.double() - reference).norm() / (reference.norm() + 1e-6)
        assert error < (1e-8 if dtype == torch.float64 else 2e-3), f"{parameter_name}: {error:.1e}"
        assert reference.norm() > 0, f"{parameter_name} would never learn"


@pytest.mark.parametrize("memory", ["short_term", "long_term", "persistent"])
def test_knocked_out_memory_reads_as_empty(memory):
    model = tiny(kernels="reference").double().without((memory,))
    tokens = random_tokens(1, 20)
    expected = run_loops(model, tokens[0].tolist(), [0] * 20, without=(memory,))
    assert (model(tokens)[0] - expected).abs().max() < 1e-10


def test_every_memory_knocked_out_leaves_each_token_alone():
    model = tiny().without(("short_term", "long_term"))
    tokens = random_tokens(1, 12)
    alone = torch.cat([model(tokens[:, t : t + 1]) for t in range(12)], dim=1)
    assert torch.allclose(model(tokens), alone, atol=1e-5)


@pytest.mark.parametrize("model_type", ["memory_mosaics_v2", "llama", "long_short_transformer"])
@pytest.mark.parametrize("kernels", ["auto", "blocked", "reference"])
def test_nothing_leaks_from_the_future_or_across_documents(model_type, kernels):
    model = tiny(model_type, kernels=kernels)
    documents = torch.tensor([[0] * 13 + [1] * 17 + [2] * 5])
    tokens = random_tokens(1, 35)
    before = model(tokens, documents=documents)
    for changed in (0, 12, 13, 20, 29, 34):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 61
        after = model(other, documents=documents)
        same = torch.tensor([t < changed or documents[0, t] != documents[0, changed] for t in range(35)])
        assert torch.equal(before[0, same], after[0, same]), f"token {changed} is seen where it must not be"
        assert not torch.equal(before[0, changed], after[0, changed])


def test_a_document_in_a_pack_reads_as_it_does_alone():
    model = tiny(kernels="reference").double()
    tokens = random_tokens(1, 30)
    documents = torch.tensor([[7] * 11 + [3] * 19])
    packed = model(tokens, documents=documents)
    assert torch.allclose(packed[:, 11:], model(tokens[:, 11:]), atol=1e-12)
    assert torch.allclose(packed[:, :11], model(tokens[:, :11]), atol=1e-12)


def test_the_delay_changes_only_what_the_long_term_memory_reads():
    model = tiny()
    tokens = random_tokens(2, 40)
    assert not torch.equal(model(tokens, delay=5), model(tokens, delay=9))
    assert torch.equal(model(tokens, delay=5)[:, :5], model(tokens, delay=9)[:, :5])
    model.without(("long_term",))
    assert torch.equal(model(tokens, delay=5), model(tokens, delay=9))


def test_initialization_is_table_6():
    model = tiny(lively=False, hidden_size=256, intermediate_size=512, num_attention_heads=8, vocab_size=500)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            depth = int(name.split(".")[2]) if "layers" in name else 0
            fan_in = 512 if "down_proj" in name else 256
            sigma = (2 * fan_in * (depth + 1)) ** -0.5
            assert weight.abs().max() <= 3 * sigma
            # A normal cut at 3 sigma has deviation 0.9866 sigma; the sample's own error is sigma / sqrt(2 n).
            assert abs(weight.std().item() / sigma - 0.9866) < 5 * (2 * weight.numel()) ** -0.5 + 1e-3, name
        elif "bandwidth_exponent" in name:
            assert torch.allclose(weight, torch.tensor(1 / 3))
        elif "bandwidth" in name:
            assert (weight == 1.5).all()
        elif "log_scale" in name:
            assert (weight == 0).all()
        elif "value_mix" in name:
            assert (weight >= 0).all() and (weight <= 1).all() and weight.std() > 0.05
        else:
            assert (weight == 1).all(), name


def test_the_same_seed_draws_the_same_weights_and_another_seed_others():
    first, again, other = tiny(lively=False), tiny(lively=False), tiny(lively=False, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_names_and_shapes_are_the_contract():
    model = tiny(num_hidden_layers=1)
    d, H, F, V = 32, 4, 48, 61
    memory = {"key_proj.weight": (d, d), "value_proj.weight": (d, d), "gate_proj.weight": (H, d),
              "decay_proj.weight": (H, d), "value_mix": (H,), "value_log_scale": (H,), "bandwidth_base": (H,),
              "bandwidth_slope": (H,), "bandwidth_exponent": (H,)}
    expected = {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,), "lm_head.weight": (V, d)}
    expected |= {f"model.layers.0.{kind}.{name}": shape for kind in ("short_term", "long_term")
                 for name, shape in memory.items()}
    expected |= {f"model.layers.0.{name}": shape for name, shape in {
        "memory_norm.weight": (d,), "out_proj.weight": (d, 2 * d), "persistent_norm.weight": (d,),
        "persistent.gate_proj.weight": (F, d), "persistent.up_proj.weight": (F, d),
        "persistent.down_proj.weight": (d, F)}.items()}
    assert {name: tuple(w.shape) for name, w in model.state_dict().items()} == expected


def test_a_meta_build_is_filled_by_init_weights():
    from mmcore.model import build_model
    built = tiny(lively=False)
    with torch.device("meta"):
        model = build_model(built.config)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(float("nan"))
    model.init_weights(0)
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("model_type", ["memory_mosaics_v2", "llama", "long_short_transformer"])
def test_shapes_are_found_on_the_meta_device(model_type):
    """Of forward and backward passes and of decoding, without numbers."""
    model, tokens = tiny(model_type).to("meta"), torch.zeros(2, 40, dtype=torch.int64, device="meta")
    assert model(tokens).shape == (2, 40, 61)
    loss = model.loss(tokens, tokens, reduction="none")
    loss.sum().backward()
    state = model.new_state(2)
    assert loss.shape == (2, 40) and model.advance(tokens, state).shape == model.advance(tokens[:, :1], state).shape == (2, 61)


def test_a_compiled_memory_has_the_same_scale_and_bandwidth():
    """Computed together there, apart else: also beyond their limits, at them, and from what is no number."""
    memory = tiny().model.layers[0].short_term
    names = ("value_log_scale", "bandwidth_base", "bandwidth_slope", "bandwidth_exponent")
    own = [getattr(memory, name) for name in names]
    columns = torch.tensor([[-3.0, 15.0, 16.0, 1.0], [10.0, 11.0, -40.0, 2.0], [float("nan"), 0.0, 10.0, 30.0],
                            [-0.5, 1.0, -1.5, 0.0]])  # fmt: skip
    with torch.no_grad():
        for parameter, values in zip(own, columns, strict=True):
            parameter.copy_(values)

    def run():
        return memory._scale_and_bandwidth()

    def gradients(values):
        return torch.autograd.grad(values, own, list(torch.arange(1.0, 17.0).view(4, 4)))

    apart, together = run(), torch.compile(run, backend="aot_eager", fullgraph=True)()
    for got, wanted in zip(together, apart, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    for got, wanted, values in zip(gradients(together), gradients(apart), columns, strict=True):
        there = ~values.isnan()
        torch.testing.assert_close(got[there], wanted[there], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_model_takes_any_number_of_tokens(strict, grad):
    """Few rows have a kernel of their own, which the program must not have chosen or excluded for good."""
    model, sizes = tiny(), {0: torch.export.Dim("rows", min=1, max=64), 1: torch.export.Dim("length", min=2, max=4096)}
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (random_tokens(3, 40),), dynamic_shapes={"tokens": sizes}, strict=strict)
        for shape in (1, 2), (3, 4), (1, 17), (3, 60):
            tokens = random_tokens(*shape)
            assert torch.allclose(program.module()(tokens), model(tokens), atol=3e-5)

"""The v1 mosaic against loops in float64, and what decoding, packing and knocking out must not change."""

import pytest
import torch

from mmcore.checkpoint.load import load_model
from mmcore.config import ModelConfig, V1Config
from mmcore.errors import ConfigError
from mmcore.model import build_model
from tests.helpers import v1_files, v1_loops
from tests.helpers.models import random_tokens
from tests.helpers.narrow import rounds_here

CASES = {
    "nano": ("nano", {}),
    "nano, biases, three banks": ("nano", {"bias": True, "pmem_count": 3}),
    "library": ("library", {}),
    "library, biases, untied, two banks": ("library", {"bias": True, "weight_tying": False, "pmem_count": 2}),
    "library, norms last": ("library", {"pre_ln": False, "bias": True}),
    "library, contextual only": ("library", {"attn_only": True, "pre_ln": False}),
    "library, keys and values of several tokens": (
        "library", {"k_kernel_size": 3, "v_fe_type": "linearconv", "v_kernel_size": 4, "v_shift": 2, "bias": True}),
    "library, own pair read": ("library", {"v_shift": 0}),
    "library, three ahead": ("library", {"v_shift": 3}),
    "eft": ("eft", {}),
    "eft, wide values": ("eft", {"v_fe_type": "linearconv", "v_kernel_size": 3, "pmem_count": 2}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys(), scope="module")
def case(request, tmp_path_factory):
    """(path, state dict, model_args) of a file of the public code."""
    kind, changes = request.param
    path = v1_files.save(tmp_path_factory.mktemp("v1") / "ckpt.pt", kind, **changes)
    return path, *v1_files.state_dict(kind, **changes)


def feed(model, state, tokens, sizes):
    return torch.cat([model.advance(piece, state, last_only=False) for piece in tokens.split(sizes, dim=1)], dim=1)


def test_logits_equal_the_loops_in_float64(case):
    """Longer than block_size, packed, and with each memory removed."""
    path, state, args = case
    model = load_model(path, dtype=torch.float64, kernels="reference")
    tokens = random_tokens(1, 29)
    documents = [0] * 11 + [1] + [2] * 17
    with torch.no_grad():
        for where, memories in ((None, ()), (documents, ()), (None, ("contextual",)), (documents, ("persistent",))):
            model.without(memories)
            got = model(tokens, documents=None if where is None else torch.tensor([where]))[0]
            want = v1_loops.logits(state, args, tokens[0].tolist(), where, memories)
            assert (got - want).abs().max() < 1e-11 * want.abs().max(), (where, memories)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "blocked"])
def test_fast_kernels_in_fp32(case, kernels):
    path, state, args = case
    model = load_model(path, kernels=kernels)
    tokens = random_tokens(2, 24)
    with torch.no_grad():
        got = model(tokens).double()
    for row in range(2):
        want = v1_loops.logits(state, args, tokens[row].tolist())
        assert (got[row] - want).abs().max() < 3e-6 * want.abs().max()


@pytest.mark.slow
def test_decoding_equals_the_full_pass(case):
    """Pieces of any size, rows of unequal length, a state saved and gone on from, a memory removed."""
    model = load_model(case[0], dtype=torch.float64)
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        whole = model(tokens)
    for sizes in ([1] * 16, [16], [3, 1, 7, 2, 3]):
        state = model.new_state(2)
        assert (feed(model, state, tokens, sizes) - whole).abs().max() < 1e-11, sizes
        assert state.length == 16
    last = model.advance(tokens, model.new_state(2))
    assert (last - whole[:, -1]).abs().max() < 1e-11
    for cut in (1, 2, 7):
        unbroken, restored = model.new_state(2), model.new_state(2)
        feed(model, unbroken, tokens[:, :cut], [cut])
        restored.load({name: tensor.clone() for name, tensor in unbroken.tensors().items()})
        sizes = [2, 1, 13 - cut]
        assert torch.equal(feed(model, unbroken, tokens[:, cut:], sizes), feed(model, restored, tokens[:, cut:], sizes))
        assert unbroken.tensors().keys() == restored.tensors().keys()


def test_rows_of_unequal_length_equal_each_row_alone(case):
    model = load_model(case[0], dtype=torch.float64)
    lengths = [7, 1, 4, 12]
    rows = [random_tokens(1, n + 3, seed=n) for n in lengths]
    padding = torch.tensor([max(lengths) - n for n in lengths])
    batch = torch.full((4, max(lengths) + 3), 5)
    for b, row in enumerate(rows):
        batch[b, padding[b] :] = row[0]
    got = feed(model, model.new_state(4, padding=padding), batch, [5, 7] + [1] * 3)
    with torch.no_grad():
        for b, row in enumerate(rows):
            assert (got[b, padding[b] :] - model(row)[0]).abs().max() < 1e-11, f"row {b}"


@pytest.mark.parametrize("memory", ["contextual", "persistent"])
def test_decoding_without_a_memory(case, memory):
    model = load_model(case[0], dtype=torch.float64, without=(memory,))
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        assert (feed(model, model.new_state(1), tokens, [8] + [1] * 4) - model(tokens)).abs().max() < 1e-11


def test_the_state_grows_by_the_pairs_alone(case):
    """A token costs the same work but for the pairs that it reads: nothing else of the state grows."""
    model = load_model(case[0])
    state = model.new_state(1)
    sizes = []
    for _ in range(3):
        model.advance(random_tokens(1, 30), state)
        sizes.append({name: tensor.shape for name, tensor in state.tensors().items()})
    growing = {name for name in sizes[0] if sizes[2][name] != sizes[1][name]}
    assert growing == {f"layers.{layer}.contextual.{part}" for layer in range(2) for part in ("keys", "values")}
    assert all(sizes[2][name][1] - sizes[1][name][1] == 30 for name in growing)


def test_bandwidths_are_bounded_as_in_the_public_code(tmp_path):
    """Scalars far beyond the limits, where the two variants differ most."""
    for kind in ("nano", "library"):
        state, args = v1_files.state_dict(kind)
        for name in state:
            if name.endswith(("key_scale", "kernel_beta")):
                state[name] += 3.0
        torch.save({"model": state, "model_args": args}, tmp_path / f"{kind}.pt")
        model = load_model(tmp_path / f"{kind}.pt", dtype=torch.float64)
        tokens = random_tokens(1, 12)
        with torch.no_grad():
            want = v1_loops.logits(state, args, tokens[0].tolist())
            assert (model(tokens)[0] - want).abs().max() < 1e-8 * want.abs().max()


def test_bf16_weights_stay_close(case):
    path, state, args = case
    model = load_model(path, dtype=torch.bfloat16)
    tokens = random_tokens(1, 12)
    rounded = {name: value.bfloat16().double() if value.is_floating_point() else value for name, value in state.items()}
    want = v1_loops.logits(rounded, args, tokens[0].tolist())
    far = 1e-2 if rounds_here(torch.bfloat16) else 1e-4  # with x rounded up to 2.8e-3 was seen
    with torch.no_grad():
        assert (model(tokens)[0] - want).abs().max() < far * want.abs().max()


def test_int8_weights_are_rounded_as_documented(case):
    """Every projection of one token and the classifier: rows to steps of a 127th of their largest entry."""
    path, state, args = case
    model = load_model(path, dtype=torch.int8)
    rounded = {name: value.double() for name, value in state.items()}
    for name, value in rounded.items():
        matrix = value.squeeze(2) if name.endswith("conv.weight") else value
        if name.endswith("weight") and matrix.ndim == 2 and "emb" not in name and "wte" not in name:
            step = matrix.abs().amax(dim=1, keepdim=True) / 127
            rounded[name] = ((matrix / step).round() * step).view(value.shape)
    tokens = random_tokens(1, 10)
    want = v1_loops.logits(rounded, args, tokens[0].tolist())
    with torch.no_grad():
        assert (model(tokens)[0] - want).abs().max() < 1e-4 * want.abs().max()
    assert (feed(model, model.new_state(1), tokens, [4, 1, 1, 1, 3])[0] - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_gradients_equal_those_of_the_loops(kernels):
    """Training is possible: every parameter's gradient, by autograd through the loops."""
    state, args = v1_files.state_dict("library", n_layer=1)
    model = build_model(ModelConfig(
        model_type="memory_mosaics_v1", vocab_size=61, hidden_size=32, intermediate_size=11, num_hidden_layers=1,
        num_attention_heads=4, tie_word_embeddings=True, v1=V1Config(variant="library")), kernels)
    model.init_weights(0)
    if kernels == "reference":
        model = model.double()
    theirs = {  # by hand, so that the loader's table is not used to check itself
        "emb.weight": "model.embed_tokens.weight", "ln_out.weight": "model.norm.weight",
        "blocks.0.ln1.weight": "model.layers.0.memory_norm.weight", "blocks.0.ln2.weight": "model.layers.0.persistent_norm.weight",
        **{f"blocks.0.{a}.{theirs}": f"model.layers.0.{b}.{ours}" for a, b in (("attn", "contextual"), ("pmem", "persistent"))
           for theirs, ours in (("leaky_key_beta", "key_decay"), ("kernel_beta", "bandwidth"), ("value_beta", "value_log_scale"),
                                ("k_featurizer.conv.weight", "key_proj.weight"), ("c_proj.weight", "out_proj.weight"))},
        "blocks.0.attn.v_featurizer.linear.weight": "model.layers.0.contextual.value_proj.weight",
        "blocks.0.attn.v_featurizer.coef": "model.layers.0.contextual.value_mix",
        "blocks.0.pmem.pmem.M_k0": "model.layers.0.persistent.slot_keys",
        "blocks.0.pmem.pmem.M_v0": "model.layers.0.persistent.slot_values",
    }  # fmt: skip
    parameters = dict(model.named_parameters())
    exact = {}
    with torch.no_grad():
        for name, ours in theirs.items():
            parameters[ours].copy_(state[name].view(parameters[ours].shape))
            exact[name] = state[name].double().requires_grad_()
    exact["head.weight"] = exact["emb.weight"]
    tokens, labels = random_tokens(1, 14), random_tokens(1, 14, seed=9)
    loss = model.loss(tokens, labels)
    loss.backward()
    want = torch.nn.functional.cross_entropy(v1_loops.logits(exact, args, tokens[0].tolist()), labels[0], reduction="sum")
    want.backward()
    tolerance = 1e-9 if kernels == "reference" else 2e-4
    assert loss.item() == pytest.approx(want.item(), rel=tolerance)
    assert set(parameters) == set(theirs.values())
    for name, ours in theirs.items():
        got, right = parameters[ours].grad.double().view(exact[name].shape), exact[name].grad
        assert (got - right).abs().max() <= tolerance * right.abs().max(), ours


def test_weights_depend_on_name_and_seed_alone():
    config = ModelConfig(model_type="memory_mosaics_v1", vocab_size=50, hidden_size=16, num_hidden_layers=2, intermediate_size=7,
                         num_attention_heads=2, tie_word_embeddings=True, v1=V1Config(bias=True))
    one, two, other = (build_model(config) for _ in range(3))
    one.init_weights(3)
    two.init_weights(3)
    other.init_weights(4)
    assert all(torch.isfinite(p).all() for p in one.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight is one.model.embed_tokens.weight


@pytest.mark.parametrize(("settings", "message"), [
    ({"model_type": "memory_mosaics_v2", "v1": V1Config()}, "remove it, or choose memory_mosaics_v1"),
    ({"model_type": "memory_mosaics_v1", "hidden_size": 30}, "does not divide into 12 heads"),
])
def test_settings_that_contradict_one_another(settings, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize(("changes", "message"), [
    ({"variant": "big"}, "choose nano or library"), ({"key_taps": 0}, "key_taps is 0"), ({"value_taps": 0}, "value_taps is 0"),
    ({"value_shift": -1}, "value_shift is -1"), ({"persistent_banks": -1}, "persistent_banks is -1"),
])
def test_settings_out_of_range(changes, message):
    with pytest.raises(ConfigError, match=message):
        V1Config(**changes)

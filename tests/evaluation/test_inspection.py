"""What --inspect shows against the paper's equations in float64, loop by loop."""

import math

import pytest
import torch

from mmcore.errors import ConfigError
from mmcore.evaluation.inspection import by_distance, distance_edges, inspect, plot
from tests.helpers.models import random_tokens, tiny
from tests.helpers.paper_loops import exact_weights, memory, norm, persistent


def expected(model, ids):
    """{(layer, memory, head): (first, weights, beta)} at the last token, from the weights alone, in float64."""
    config, w = model.config, exact_weights(model)
    H, D, place = config.num_attention_heads, config.hidden_size // config.num_attention_heads, len(ids) - 1
    x = [w["model.embed_tokens.weight"][token] for token in ids]
    found = {}
    for layer in range(config.num_hidden_layers):
        part = {name.removeprefix(f"model.layers.{layer}."): v for name, v in w.items() if name.startswith(f"model.layers.{layer}.")}
        y = [norm(one, part["memory_norm.weight"], config.rms_norm_eps) for one in x]
        for kind, window, delay in (("short_term", config.short_term_window, 1), ("long_term", 10**9, config.long_term_delay)):
            m = {name.removeprefix(f"{kind}."): v for name, v in part.items() if name.startswith(kind)}
            for h in range(H):
                rows, kbar, keys = slice(h * D, (h + 1) * D), torch.zeros(D, dtype=torch.float64), []
                for y_t in y:
                    g, lam = torch.exp(m["gate_proj.weight"][h] @ y_t), torch.exp(-(m["decay_proj.weight"][h] @ y_t).abs())
                    kbar = g * (m["key_proj.weight"][rows] @ y_t) + lam * kbar
                    keys.append(kbar / kbar.norm())
                pairs = [i for i in range(len(ids)) if place - window + 1 <= i <= place - delay]
                if not pairs:
                    found[layer, kind, h] = (None, torch.zeros(0), math.nan)
                    continue
                beta = float(m["bandwidth_slope"][h].exp() * len(pairs) ** float(m["bandwidth_exponent"][h].abs().clamp(max=1))
                             + m["bandwidth_base"][h].exp())
                scores = torch.stack([beta * keys[place] @ keys[i] for i in pairs])
                found[layer, kind, h] = (pairs[0], scores.exp() / scores.exp().sum(), beta)
        documents = [0] * len(ids)
        short = memory(part, "short_term", y, documents, H, config.short_term_window, 1)
        long = memory(part, "long_term", y, documents, H, 10**9, config.long_term_delay)
        x = [a + part["out_proj.weight"] @ torch.cat([s, g]) for a, s, g in zip(x, short, long, strict=True)]
        x = [a + persistent(part, norm(a, part["persistent_norm.weight"], config.rms_norm_eps)) for a in x]
    return found


@pytest.mark.parametrize("length", [24, 7, 3])
def test_weights_are_the_papers(length):
    model = tiny()
    ids = random_tokens(length, seed=5).tolist()
    reads = inspect(model, ids)
    truth = expected(model, ids)
    assert len(reads) == len(truth) == 2 * 2 * 4
    for read in reads:
        first, weights, beta = truth[read.layer, read.memory, read.head]
        assert read.size == len(weights)
        if read.size:
            assert read.first == first and read.bandwidth == pytest.approx(beta, rel=1e-5)
            assert torch.allclose(read.weights.double(), weights, atol=1e-5)
            assert float(read.weights.sum()) == pytest.approx(1, abs=1e-6)
        else:
            assert math.isnan(read.bandwidth)


def test_what_comes_after_the_token_does_not_matter():
    ids = random_tokens(30, seed=6).tolist()
    for a, b in zip(inspect(tiny(), ids, 17), inspect(tiny(), ids[:18]), strict=True):
        assert torch.allclose(a.weights, b.weights, atol=1e-6)
    assert inspect(tiny(), ids, -30)[0].size == 0  # the first token has read nothing


@pytest.mark.parametrize(("kind", "changes"), [("llama", {"num_key_value_heads": 2}), ("long_short_transformer", {})])
def test_transformers_are_shown_in_the_same_terms(kind, changes):
    """The weights, put on the values, give what the attention gives."""
    model = tiny(kind, **changes)
    ids = random_tokens(21, seed=7).tolist()
    reads = inspect(model, ids)
    memories = {read.memory for read in reads}
    assert memories == ({"attention"} if kind == "llama" else {"short_term", "long_term"})
    assert all(float(read.weights.sum()) == pytest.approx(1, abs=1e-6) for read in reads)
    assert all(read.bandwidth == pytest.approx(8 ** -0.5) for read in reads)
    with torch.no_grad():
        layer = model.model.layers[0]
        attention = layer.self_attn if kind == "llama" else layer.short_term
        y = (layer.input_layernorm if kind == "llama" else layer.memory_norm)(model.embed(torch.tensor([ids])))
        values = attention._arrange(y, 0)[2].repeat_interleave(attention.heads // attention.kv_heads, dim=2)
        out = attention.o_proj if kind == "llama" else (lambda read: read)
        mine = [read for read in reads if read.layer == 0 and read.memory in ("attention", "short_term")]
        summed = [read.weights @ values[0, read.first : read.first + read.size, read.head] for read in mine]
        from mmcore.model.documents import Packing

        assert torch.allclose(out(torch.cat(summed)[None])[0], attention(y, Packing(), 0)[0, -1], atol=1e-5)


def test_removed_memories_are_left_out():
    reads = inspect(tiny().without(("long_term",)), random_tokens(9).tolist())
    assert {read.memory for read in reads} == {"short_term"}


@pytest.mark.slow
def test_weight_by_distance(tmp_path):
    ids = random_tokens(40, seed=8).tolist()
    reads = inspect(tiny(), ids)
    edges = distance_edges(39)
    assert edges == [0, 1, 2, 4, 8, 16, 32, 40]
    for read in reads:
        sums = by_distance(read, 39, edges)
        for low, high, total in zip(edges, edges[1:], sums, strict=False):
            mine = [float(weight) for i, weight in enumerate(read.weights) if low <= 39 - (read.first + i) < high]
            assert total == pytest.approx(sum(mine), abs=1e-6)
        assert sum(sums) == pytest.approx(1, abs=1e-6)
        best, weight = read.strongest(1)[0]
        assert weight == float(read.weights.max()) and float(read.weights[best - read.first]) == weight
    plot(reads, 39, "title", [tmp_path / "a.png", tmp_path / "a.svg"])
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "a.svg").read_text()


def test_a_token_that_is_not_there():
    with pytest.raises(ConfigError, match="--token is 5: the text has the tokens 0 to 4"):
        inspect(tiny(), [1, 2, 3, 4, 5], 5)

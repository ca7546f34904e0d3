"""The memories' health against loops in float64 written from the equations."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmcore.config import DistributedConfig, ModelConfig, build_recipe
from mmcore.distributed.parallelize import parallelize
from mmcore.model import build_model
from mmcore.training import events
from mmcore.training.health import measure
from mmcore.training.metrics import HealthLines, TensorBoard, by_kind, summary
from mmcore.training.setup import prepare_trainer
from tests.helpers.paper_loops import exact_weights
from tests.helpers.tiny_run import tiny_values

CONFIG = ModelConfig(
    vocab_size=60, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
    short_term_window=7, long_term_delay=4, max_position_embeddings=64,
)  # fmt: skip
T = 40


@pytest.fixture(scope="module")
def model():
    model = build_model(CONFIG)
    model.init_weights(3)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.4 * torch.randn(parameter.shape, generator=draw))
            else:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def samples():
    draw = np.random.default_rng(0)
    documents = np.repeat([0, 1], [13, T + 1 - 13]).astype(np.int32)
    row = SimpleNamespace(tokens=draw.integers(0, 60, T + 1), documents=documents, trained=np.ones(T + 1, bool))
    return [row]


def directly(weights, samples):
    """layer, memory -> quantity -> numbers, position by position and pair by pair."""
    tokens, documents = samples[0].tokens[:T].tolist(), samples[0].documents[:T].tolist()
    d, H, D = CONFIG.hidden_size, CONFIG.num_attention_heads, CONFIG.head_size
    x = [weights["model.embed_tokens.weight"][token] for token in tokens]
    found = {}
    for layer in range(2):
        part = {name.removeprefix(f"model.layers.{layer}."): w for name, w in weights.items() if f"layers.{layer}." in name}
        y = [u / torch.sqrt((u * u).mean() + CONFIG.rms_norm_eps) * part["memory_norm.weight"] for u in x]
        outputs = []
        for kind, window, delay in (("short_term", CONFIG.short_term_window, 1), ("long_term", 10**9, CONFIG.long_term_delay)):
            w = {name.removeprefix(f"{kind}."): v for name, v in part.items() if name.startswith(kind)}
            readable = {t: [i for i in range(T) if t - window + 1 <= i <= t - delay and documents[i] == documents[t]] for t in range(T)}
            reading = [t for t in range(T) if len(readable[t]) >= 2]
            wanted = min(16, len(reading))
            at = [reading[round(k * (len(reading) - 1) / (wanted - 1))] for k in range(wanted)]
            beta = [[math.exp(min(float(w[f"bandwidth_{p}"][h]), 10)) for h in range(H)] for p in ("base", "slope")]
            alpha = [min(abs(float(w["bandwidth_exponent"][h])), 1) for h in range(H)]
            entropy, out = [], [[None] * H for _ in range(T)]
            for h in range(H):
                rows, keys, total, bar = slice(h * D, (h + 1) * D), [], 0.0, None
                for t in range(T):
                    fresh = t == 0 or documents[t] != documents[t - 1]
                    step = torch.exp(w["gate_proj.weight"][h] @ y[t]) * (w["key_proj.weight"][rows] @ y[t])
                    lam = torch.exp(-torch.abs(w["decay_proj.weight"][h] @ y[t]))
                    bar = step if fresh else step + lam * bar
                    keys.append(bar / bar.norm())
                raws = [w["value_proj.weight"][rows] @ y[t] for t in range(T)] + [torch.zeros(D, dtype=torch.float64)]
                gamma, scale = w["value_mix"][h], torch.exp(torch.clamp(w["value_log_scale"][h], max=15))
                mixed = [gamma * raws[t] + (1 - gamma) * raws[t + 1] for t in range(T)]
                values = [scale * v / v.norm() for v in mixed]
                for t in range(T):
                    pairs = readable[t]
                    if not pairs:
                        out[t][h] = torch.zeros(D, dtype=torch.float64)
                        continue
                    b = beta[1][h] * len(pairs) ** alpha[h] + beta[0][h]
                    p = torch.softmax(torch.stack([b * (keys[t] @ keys[i]) for i in pairs]), 0)
                    out[t][h] = sum(p_i * values[i] for p_i, i in zip(p, pairs, strict=True))
                    if t in at:
                        total += float(-(p * p.log()).sum()) / math.log(len(pairs))
                entropy.append(total / len(at))
            outputs.append([torch.cat(heads) for heads in out])
            found[layer, kind] = {
                "bandwidth_base": beta[0], "bandwidth_slope": beta[1], "bandwidth_exponent": alpha,
                "value_scale": torch.exp(w["value_log_scale"]).tolist(), "value_mix": w["value_mix"].tolist(),
                "log_gate": [float(w["gate_proj.weight"][h] @ y[t]) for t in at for h in range(H)],
                "decay": [math.exp(-abs(float(w["decay_proj.weight"][h] @ y[t]))) for t in at for h in range(H)],
                "entropy": entropy,
            }  # fmt: skip
        x = [u + part["out_proj.weight"] @ torch.cat([s, g]) for u, s, g in zip(x, *outputs, strict=True)]
        for t in range(T):
            y_t = x[t] / torch.sqrt((x[t] * x[t]).mean() + CONFIG.rms_norm_eps) * part["persistent_norm.weight"]
            gate = part["persistent.gate_proj.weight"] @ y_t
            x[t] = x[t] + part["persistent.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * (part["persistent.up_proj.weight"] @ y_t))
    assert len(x[0]) == d
    return found


def test_every_number_is_that_of_the_equations(model, samples):
    expected, found = directly(exact_weights(model), samples), measure(model, samples, torch.device("cpu"), "fp32")
    assert [(memory["layer"], memory["memory"]) for memory in found] == list(expected)
    for memory in found:
        right = expected[memory["layer"], memory["memory"]]
        assert memory.keys() == right.keys() | {"layer", "memory"}
        for name, values in right.items():
            assert memory[name] == pytest.approx(values, rel=2e-4, abs=2e-5), (memory["layer"], memory["memory"], name)
    entropies = [value for memory in found for value in memory["entropy"]]
    assert all(0 < value < 1 for value in entropies) and max(entropies) - min(entropies) > 0.05


def test_measuring_leaves_the_model_as_it_was(model, samples):
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    measure(model, samples, torch.device("cpu"), "fp32")
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    model.eval()


def test_recomputation_changes_nothing_and_a_transformer_has_no_memories(model, samples):
    expected = measure(model, samples, torch.device("cpu"), "fp32")
    again = build_model(CONFIG)
    again.load_state_dict(model.state_dict())
    parallelize(again, DistributedConfig(activation_checkpointing="full"))
    assert measure(again, samples, torch.device("cpu"), "fp32") == expected
    llama = build_model(ModelConfig(model_type="llama", vocab_size=60, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    llama.init_weights(0)
    assert measure(llama, samples, torch.device("cpu"), "fp32") == ()


def test_a_window_too_short_for_the_long_term_memory_has_no_entropy(model):
    row = SimpleNamespace(tokens=np.arange(5), documents=np.zeros(5, np.int32), trained=np.ones(5, bool))
    long_term = measure(model, [row], torch.device("cpu"), "fp32")[1]
    assert long_term["decay"] == [] and all(math.isnan(value) for value in long_term["entropy"])
    assert "long_term/entropy" not in by_kind([long_term])


def test_what_is_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    memories = (
        {"layer": 0, "memory": "long_term", "entropy": [0.1, 0.2, 0.3, 0.4, 0.5], "decay": [math.nan]},
        {"layer": 1, "memory": "long_term", "entropy": [0.9], "decay": []},
    )
    lines, board = HealthLines(tmp_path / "health.jsonl"), TensorBoard(tmp_path / "tensorboard", 1, 0)
    for listener in (lines, board):
        listener(events.Health(50, memories, 0.25))
    board.close()
    (row,) = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert row == {"kind": "health", "step": 50, "seconds": 0.25, "memories": [
        {"layer": 0, "memory": "long_term", "entropy": [0.1, 0.2, 0.3, 0.4, 0.5], "decay": [None] * 5},
        {"layer": 1, "memory": "long_term", "entropy": [0.9] * 5},
    ]}  # fmt: skip
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert read.Tags()["histograms"] == ["long_term/entropy"]
    assert read.Histograms("long_term/entropy")[0].histogram_value.num == 6
    assert summary([4.0, 0.0]) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_run_measures_when_its_recipe_says_and_resuming_drops_later_lines(tmp_path):
    values = tiny_values(tmp_path, health_every=3, steps=7)
    trainer = prepare_trainer(build_recipe(values))
    trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "run" / "health.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    assert [(m["layer"], m["memory"]) for m in rows[0]["memories"]] == [(0, "short_term"), (0, "long_term"), (1, "short_term"), (1, "long_term")]
    off = prepare_trainer(build_recipe(tiny_values(tmp_path, health_every=0) | {"checkpoint": {"folder": str(tmp_path / "off")}}))
    off.fit()
    assert not (tmp_path / "off" / "health.jsonl").exists()

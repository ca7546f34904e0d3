"""The Memory Mosaic as loops written straight from the paper's equations (3) to (10), one position, one head, one
pair at a time, in float64. Slow, and the truth the fast code is held to; autograd gives its gradients.

Nothing of mmcore is used but the weights, by their names in an exported checkpoint.
"""

import torch
from torch import Tensor


def logits(weights: dict[str, Tensor], tokens: list[int], documents: list[int], heads: int, layers: int, window: int,
           delay: int, eps: float, without: tuple[str, ...] = ()) -> Tensor:
    """Logits [T, V] of one packed row."""
    x = [weights["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(layers):
        part = {name.removeprefix(f"model.layers.{layer}."): w for name, w in weights.items()
                if name.startswith(f"model.layers.{layer}.")}
        y = [norm(x_t, part["memory_norm.weight"], eps) for x_t in x]
        nothing = [torch.zeros_like(y_t) for y_t in y]
        short = nothing if "short_term" in without else memory(part, "short_term", y, documents, heads, window, 1)
        long = nothing if "long_term" in without else memory(part, "long_term", y, documents, heads, 10**9, delay)
        x = [x_t + part["out_proj.weight"] @ torch.cat([s, g]) for x_t, s, g in zip(x, short, long, strict=True)]
        if "persistent" not in without:
            x = [x_t + persistent(part, norm(x_t, part["persistent_norm.weight"], eps)) for x_t in x]
    return torch.stack([weights["lm_head.weight"] @ norm(x_t, weights["model.norm.weight"], eps) for x_t in x])


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).sum() / x.numel() + eps) * weight


def persistent(part: dict[str, Tensor], y: Tensor) -> Tensor:
    gate = part["persistent.gate_proj.weight"] @ y
    return part["persistent.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * (part["persistent.up_proj.weight"] @ y))


def memory(part: dict[str, Tensor], kind: str, y: list[Tensor], documents: list[int], heads: int, window: int,
           delay: int) -> list[Tensor]:
    """Equations (4), (6), (8), (9), (10) of one memory at every position of a row."""
    w = {name.removeprefix(f"{kind}."): weight for name, weight in part.items() if name.startswith(f"{kind}.")}
    T, d = len(y), y[0].numel()
    D = d // heads
    out = [[None] * heads for _ in range(T)]
    for h in range(heads):
        rows = slice(h * D, (h + 1) * D)
        keys, values = [], []
        kbar = None
        for t in range(T):  # (8)
            raw = w["key_proj.weight"][rows] @ y[t]
            if "key_decay" in w:  # keys without gates: the same average at every token
                g, lam = torch.ones((), dtype=torch.float64), torch.exp(-torch.abs(w["key_decay"][h]))
            else:
                g = torch.exp(w["gate_proj.weight"][h] @ y[t])
                lam = torch.exp(-torch.abs(w["decay_proj.weight"][h] @ y[t]))
            fresh = t == 0 or documents[t] != documents[t - 1]
            kbar = g * raw if fresh else g * raw + lam * kbar
            keys.append(kbar / torch.sqrt((kbar * kbar).sum()))
        gamma = w["value_mix"][h]
        scale = torch.exp(torch.clamp(w["value_log_scale"][h], max=15))
        raws = [w["value_proj.weight"][rows] @ y[t] for t in range(T)]
        for t in range(T - 1):  # (9)
            vbar = gamma * raws[t] + (1 - gamma) * raws[t + 1]
            values.append(scale * vbar / torch.sqrt((vbar * vbar).sum()))
        beta_0 = torch.exp(torch.clamp(w["bandwidth_base"][h], max=10))
        beta_1 = torch.exp(torch.clamp(w["bandwidth_slope"][h], max=10))
        alpha = torch.clamp(torch.abs(w["bandwidth_exponent"][h]), max=1)
        for t in range(T):  # (10) says which pairs, (6) how sharply, (4) what comes out
            read = [i for i in range(T) if t - window + 1 <= i <= t - delay and documents[i] == documents[t]]
            if not read:
                out[t][h] = torch.zeros(D, dtype=torch.float64)
                continue
            beta = beta_1 * torch.pow(torch.tensor(float(len(read)), dtype=torch.float64), alpha) + beta_0
            scores = [beta * (keys[t] * keys[i]).sum() for i in read]
            top = max(float(s.detach()) for s in scores)
            parts = [torch.exp(s - top) for s in scores]
            total = sum(parts)
            out[t][h] = sum(p / total * values[i] for p, i in zip(parts, read, strict=True))
    return [torch.cat(heads_t) for heads_t in out]


def exact_weights(model, requires_grad: bool = False) -> dict[str, Tensor]:
    """A float64 copy of a model's weights by name."""
    return {name: w.detach().double().clone().requires_grad_(requires_grad) for name, w in model.state_dict().items()}


def cross_entropy(logits_TV: Tensor, labels: list[int]) -> Tensor:
    """Sum over labels >= 0 of -log softmax, from its definition."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits_TV, labels, strict=True):
        if label >= 0:
            top = row.max()
            total = total + top + torch.log(torch.exp(row - top).sum()) - row[label]
    return total



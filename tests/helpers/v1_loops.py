"""A v1 mosaic as loops over positions, heads and pairs in float64, by the names and shapes of the public checkpoints.

Nothing of mmcore is used. The equations are those of the paper (arXiv 2405.06394, section 5) with the public code's
parameterization: every scalar times ten, keys and queries both scaled by sqrt(beta).
"""

import math

import torch
from torch import Tensor

LARGEST_LOG = math.log(2**16 - 1)


def logits(state: dict[str, Tensor], args: dict, tokens: list[int], documents: list[int] | None = None,
           without: tuple[str, ...] = ()) -> Tensor:
    """Logits [T, V] of one row; `args` are the checkpoint's model_args."""
    w = {name: value.double() for name, value in state.items()}
    nano = "mosaic.wte.weight" in w
    documents = documents or [0] * len(tokens)
    first = [next(i for i, other in enumerate(documents) if other == mine) for mine in documents]
    embedding = w["mosaic.wte.weight" if nano else "emb.weight"]
    x = [embedding[token] for token in tokens]
    for layer in range(args["n_layer"]):
        root = f"mosaic.h.{layer}." if nano else f"blocks.{layer}."
        block = {name.removeprefix(root): value for name, value in w.items() if name.startswith(root)}
        names = ("ln_1", "attn", "ln_2", "mlp") if nano else ("ln1", "attn", "ln2", "pmem")
        x = sublayer(block, names[0], names[1], x, args, first, nano, persistent=False, empty="contextual" in without)
        if not args.get("attn_only"):
            x = sublayer(block, names[2], names[3], x, args, first, nano, persistent=True, empty="persistent" in without)
    final, head = ("mosaic.ln_f", "lm_head.weight") if nano else ("ln_out", "head.weight")
    factor = 1.0 if nano else 1.0 / math.sqrt(args["n_embd"])
    return torch.stack([factor * (w[head] @ layer_norm(w, final, x_t)) for x_t in x])


def sublayer(block, norm, memory, x, args, first, nano, persistent, empty):
    y = [layer_norm(block, norm, x_t) for x_t in x]
    base = x if args.get("pre_ln", True) else y
    part = {name.removeprefix(f"{memory}."): value for name, value in block.items() if name.startswith(f"{memory}.")}
    H, d = args["n_head"], args["n_embd"]
    if empty:
        read = [torch.zeros(d, dtype=torch.float64) for _ in x]
    else:
        heads = [(recall if persistent else context)(part, y, h, args, first, nano) for h in range(H)]
        read = [torch.cat([head[t] for head in heads]) for t in range(len(x))]
    out = part["c_proj.weight"]
    bias = part.get("c_proj.bias", torch.zeros(d, dtype=torch.float64))
    return [b + out @ r + bias for b, r in zip(base, read, strict=True)]


def layer_norm(block, name, x):
    mean = x.sum() / x.numel()
    variance = ((x - mean) ** 2).sum() / x.numel()
    y = (x - mean) / torch.sqrt(variance + 1e-5) * block[f"{name}.weight"]
    return y + block[f"{name}.bias"] if f"{name}.bias" in block else y


def keys(part, y, h, args, first, nano):
    """Unit keys of head h at every position, by the definition of the leaky average as a sum over the past."""
    D = args["n_embd"] // args["n_head"]
    rows = slice(h * D, (h + 1) * D)
    if nano:
        theta = part["k_featurizer.leaky_avg.leaky_key_beta"].flatten()[h]
        raw = linear(part, "k_featurizer.W_k", y, rows)
    elif "leaky_average.linear.weight" in part:
        theta = part["leaky_average.leaky_beta_w_under"][h]
        raw = linear(part, "leaky_average.linear", y, rows)
    elif "k_featurizer.linear.weight" in part:
        theta = part["leaky_key_beta"][h]
        raw = linear(part, "k_featurizer.linear", y, rows)
    else:
        theta = part["leaky_key_beta"][h]
        raw = convolution(part, "k_featurizer.conv", y, rows, first, 0)
    rate = 10 * torch.abs(theta)
    out = []
    for t in range(len(y)):
        total = sum(torch.exp(-rate * (t - i)) * raw[i] for i in range(first[t], t + 1))
        out.append(total / torch.sqrt((total * total).sum()))
    return out


def linear(part, name, y, rows):
    bias = part[f"{name}.bias"][rows] if f"{name}.bias" in part else 0.0
    return [part[f"{name}.weight"][rows] @ y_t + bias for y_t in y]


def convolution(part, name, y, rows, first, shift):
    """A value for each position from the tokens up to t + shift, as many as the kernel is wide; none beyond the row or
    before the document is counted."""
    weight = part[f"{name}.weight"][rows]
    wide = weight.shape[2]
    out = []
    for t in range(len(y)):
        total = part[f"{name}.bias"][rows].clone() if f"{name}.bias" in part else torch.zeros(len(weight), dtype=torch.float64)
        for j in range(wide):
            source = t + shift - (wide - 1) + j
            if first[t] <= source < len(y):
                total = total + weight[:, :, j] @ y[source]
        out.append(total)
    return out


def context(part, y, h, args, first, nano):
    """What head h of the contextual memory reads at every position."""
    D, T = args["n_embd"] // args["n_head"], len(y)
    shift = args.get("v_shift", 1)
    rows = slice(h * D, (h + 1) * D)
    k = keys(part, y, h, args, first, nano)
    if nano:
        raw = linear(part, "v_featurizer.W_v", y, rows)
        mix, size = part["v_featurizer.coef"].flatten()[h], part["v_featurizer.val_scale"].flatten()[h]
        sharp = torch.exp(torch.clamp(10 * part["k_featurizer.key_scale"].flatten()[h], max=LARGEST_LOG))
    else:
        size = part["value_beta"][h]
        sharp = torch.exp(torch.clamp(10 * part["kernel_beta"][h], max=5))
        mix = part["v_featurizer.coef"][h] if "v_featurizer.coef" in part else None
        if mix is not None:
            raw = linear(part, "v_featurizer.linear", y, rows)
    if mix is None:
        mean = convolution(part, "v_featurizer.conv", y, rows, first, shift)
    else:
        mean = [mix * raw[t] + (1 - mix) * raw[t + shift] if t + shift < T else raw[t] for t in range(T)]
    v = [torch.exp(10 * size) * m / torch.sqrt((m * m).sum()) for m in mean]
    out = []
    for t in range(T):
        pairs = range(first[t], t - shift + 1)
        if not pairs:
            out.append(torch.zeros(D, dtype=torch.float64))
            continue
        scores = torch.stack([((sharp * k[t]) * (sharp * k[i])).sum() for i in pairs])
        share = torch.exp(scores - scores.max())
        share = share / share.sum()
        out.append(sum(s * v[i] for s, i in zip(share, pairs, strict=True)))
    return out


def recall(part, y, h, args, first, nano):
    """What head h of the persistent memory reads at every position."""
    if nano:
        size = part["out_scale"].flatten()[h]
        sharp = torch.exp(torch.clamp(2 * 10 * part["k_featurizer.key_scale"].flatten()[h], max=LARGEST_LOG))
        banks = [(part["P_k"][c, 0, h], part["P_v"][c, 0, h]) for c in range(args["pmem_count"])]
    else:
        size = part["value_beta"][h]
        sharp = torch.exp(torch.clamp(10 * part["kernel_beta"][h], max=5)) ** 2
        banks = [(part[f"pmem.M_k{c}"][0, h], part[f"pmem.M_v{c}"][0, h]) for c in range(args["pmem_count"])]
    out = []
    for k in keys(part, y, h, args, first, nano):
        total = 0
        for bank_keys, bank_values in banks:
            scores = torch.stack([sharp * (k * key).sum() for key in bank_keys])
            share = torch.exp(scores - scores.max())
            total = total + sum(s * value for s, value in zip(share / share.sum(), bank_values, strict=True))
        out.append(torch.exp(10 * size) * total / len(banks))
    return out

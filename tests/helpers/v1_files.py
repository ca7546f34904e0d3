"""Checkpoints with the names, shapes, buffers and settings that the public v1 code writes; weights are random.

nano: nanoMosaics/train.py; library, eft: Library/train_memory_mosaics.py with either of its two models.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

NANO = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, bias=False, vocab_size=61, dropout=0.0, pmem_count=1, pmem_size=11)
LIBRARY = dict(
    n_layer=2, n_head=4, n_embd=32, block_size=24, v_shift=1, att_shift=0, pmem_size=11, pmem_count=1, ic_dropout=0.05,
    hd_dropout=0.05, bias=False, weight_tying=True, pre_ln=True, k_kernel_size=1, v_kernel_size=2, k_fe_type="linearconv",
    v_fe_type="lowrlinearconv", skip_tokens=0, attn_only=False, vocab_size=61, seed=1337, out_dir="results/debug",
    dtype="float16", compile=True, milestone=[10000], learning_rate=0.005, dataset="BabiStories",
)


def state_dict(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> tuple[OrderedDict, dict]:
    """(`model`, `model_args`) of a checkpoint; `kind` is nano, library or eft."""
    args = (NANO if kind == "nano" else LIBRARY) | changes
    draw = _Draw(seed, dtype)
    state = _nano(args, draw) if kind == "nano" else _library(args, draw, fast=kind == "eft")
    return state, args


def save(path: Path, kind: str, *, prefix: str = "", seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A ckpt.pt as its train script leaves it, an optimizer's state included; `prefix` is torch.compile's."""
    state, args = state_dict(kind, seed, dtype, **changes)
    parameters = [value for value in state.values() if value.is_floating_point()]
    moments = {i: {"step": torch.tensor(7.0), "exp_avg": p * 0, "exp_avg_sq": p * 0} for i, p in enumerate(parameters[:3])}
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "fused": None, "params": [0, 1, 2]}
    checkpoint = {
        "model": OrderedDict((prefix + name, value) for name, value in state.items()),
        "optimizer": {"state": moments, "param_groups": [group]},
        "model_args": args,
        "iter_num": 2000,
    }
    checkpoint["model"]._metadata = OrderedDict([("", {"version": 1})])
    if kind == "nano":
        checkpoint |= {"best_val_loss": torch.tensor(3.25), "config": {"dataset": "openwebtext", "compile": True}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path


class _Draw:
    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int, size: float = 0.3, around: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * size + around).to(self.dtype)


def _nano(args: dict, draw: _Draw) -> OrderedDict:
    d, H, n = args["n_embd"], args["n_head"], args["block_size"]
    D, N, C = d // H, args["pmem_size"], args["pmem_count"]
    state = OrderedDict()

    def norm(name: str) -> None:
        state[f"{name}.weight"] = draw(d, around=1.0)
        if args["bias"]:
            state[f"{name}.bias"] = draw(d)

    def linear(name: str) -> None:
        state[f"{name}.weight"] = draw(d, d)
        if args["bias"]:
            state[f"{name}.bias"] = draw(d)

    def keys(name: str) -> None:
        state[f"{name}.key_scale"] = draw(1, H, 1, 1, size=0.03, around=0.1)
        linear(f"{name}.W_k")
        state[f"{name}.leaky_avg.leaky_key_beta"] = draw(1, H, 1, 1, size=0.1)
        state[f"{name}.leaky_avg.coef"] = leaky_table(n)

    state["mosaic.wte.weight"] = embedding = draw(args["vocab_size"], d, size=1.0)
    for layer in range(args["n_layer"]):
        root = f"mosaic.h.{layer}"
        norm(f"{root}.ln_1")
        state[f"{root}.attn.bias"] = torch.tril(torch.ones(n, n), diagonal=-1).view(1, 1, n, n).bool()
        keys(f"{root}.attn.k_featurizer")
        state[f"{root}.attn.v_featurizer.coef"] = draw(1, H, 1, 1, around=0.5)
        state[f"{root}.attn.v_featurizer.val_scale"] = draw(1, H, 1, 1, size=0.05, around=-0.05)
        linear(f"{root}.attn.v_featurizer.W_v")
        linear(f"{root}.attn.c_proj")
        norm(f"{root}.ln_2")
        state[f"{root}.mlp.P_k"] = draw(C, 1, H, N, D, size=0.5)
        state[f"{root}.mlp.P_v"] = draw(C, 1, H, N, D, size=0.5)
        state[f"{root}.mlp.out_scale"] = draw(1, H, 1, 1, size=0.05, around=-0.05)
        keys(f"{root}.mlp.k_featurizer")
        linear(f"{root}.mlp.c_proj")
    norm("mosaic.ln_f")
    state["lm_head.weight"] = embedding
    return state


def leaky_table(n: int) -> Tensor:
    """The public code's buffer `coef`: -(i - j) at and below the diagonal, 0 above it."""
    age = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    return -age.clamp(min=0).float()


def _library(args: dict, draw: _Draw, fast: bool) -> OrderedDict:
    d, H = args["n_embd"], args["n_head"]
    D, N, C = d // H, args["pmem_size"], args["pmem_count"]
    state = OrderedDict()

    def norm(name: str) -> None:
        state[f"{name}.weight"] = draw(d, around=1.0)
        if args["bias"]:
            state[f"{name}.bias"] = draw(d)

    def weights(name: str, *taps: int) -> None:
        state[f"{name}.weight"] = draw(d, d, *taps)
        if args["bias"]:
            state[f"{name}.bias"] = draw(d)

    def features(name: str, kind: str, kernel: int) -> None:
        if kind == "linearconv":
            return weights(f"{name}.conv", kernel)
        state[f"{name}.coef"] = draw(H, around=0.5)
        weights(f"{name}.linear")

    def scalars(name: str) -> None:
        if not fast:
            state[f"{name}.leaky_key_beta"] = draw(H, size=0.1)
        state[f"{name}.kernel_beta"] = draw(H, size=0.03, around=0.1)
        state[f"{name}.value_beta"] = draw(H, size=0.05, around=-0.05)

    def keys(name: str) -> None:
        if fast:
            state[f"{name}.leaky_average.leaky_beta_w_under"] = shared = draw(H, size=0.1)
            state[f"{name}.leaky_average.leaky_beta_u_under"] = shared
            weights(f"{name}.leaky_average.linear")
        else:
            features(f"{name}.k_featurizer", args["k_fe_type"], args["k_kernel_size"])

    state["emb.weight"] = embedding = draw(args["vocab_size"], d, size=1.0)
    for layer in range(args["n_layer"]):
        root = f"blocks.{layer}"
        norm(f"{root}.ln1")
        scalars(f"{root}.attn")
        keys(f"{root}.attn")
        features(f"{root}.attn.v_featurizer", args["v_fe_type"], args["v_kernel_size"])
        weights(f"{root}.attn.c_proj")
        if args["attn_only"]:
            continue
        norm(f"{root}.ln2")
        scalars(f"{root}.pmem")
        for c in range(C):
            state[f"{root}.pmem.pmem.M_k{c}"] = draw(1, H, N, D, size=0.5)
            state[f"{root}.pmem.pmem.M_v{c}"] = draw(1, H, N, D, size=0.5)
        keys(f"{root}.pmem")
        weights(f"{root}.pmem.c_proj")
    norm("ln_out")
    state["head.weight"] = embedding if args["weight_tying"] else draw(args["vocab_size"], d, size=1.0)
    return state

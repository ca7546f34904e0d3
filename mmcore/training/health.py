"""The memories' health: what their parameters have become, and how sharply they read.

One window of training text goes through the model once more, without gradients, and at each contextual memory a few
positions are looked at with the equations themselves. Per layer and memory kind:

    bandwidth_base, bandwidth_slope, bandwidth_exponent   beta_0, beta_1 and alpha of equation (6), by head
    value_scale, value_mix     alpha_psi and gamma of equation (9), by head
    log_gate, decay            W_g x (the gate is its exp) and lambda of equation (8), by position and head
    entropy                    of the weights softmax_i(beta k.k_i), over log n: 1 reads all n pairs alike, 0 reads one;
                               a head's mean over the positions

What to look for: exponents that run to 0 or 1, decays all near 1 (no forgetting) or 0 (no memory), entropies that stay
near 1 (a memory that only averages) or fall to 0 (one that copies a single pair).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.data.loader import make_batch
from mmcore.distributed.parallelize import reshard
from mmcore.kernels.memory_read.reference import bandwidth, intervals
from mmcore.model.documents import Packing
from mmcore.model.memories import ContextualMemory
from mmcore.training.step import autocast

POSITIONS = 16
"""Positions looked at in the window."""


def measure(model: nn.Module, samples: Any, device: torch.device, precision: str) -> tuple[dict[str, Any], ...]:
    """The health of every contextual memory of `model`: dicts with `layer`, `memory` (its kind) and, for each quantity
    above, a list of numbers. Empty for a model that has none.

    samples: mmcore.data Samples; the first one is read, so that measurements can be compared over a run. The reading
    is the one of inference (the configuration's delay). Where the weights are cut over ranks, every rank must call it.
    """
    names = [(name, module) for name, module in model.named_modules() if isinstance(module, ContextualMemory)]
    if not names:
        return ()
    found: list[dict[str, Any]] = []
    batch = make_batch(samples, range(1))
    tokens, labels, documents = (part.to(device) for part in (batch.tokens, batch.labels, batch.documents))
    was_training = model.training
    model.eval()
    with contextlib.ExitStack() as closing:
        closing.callback(model.train, was_training)
        closing.callback(reshard, model)
        for name, module in names:
            closing.callback(module.register_forward_hook(_looking(name, found)).remove)
        closing.enter_context(torch.no_grad())
        closing.enter_context(autocast(device, precision))
        closing.enter_context(torch.compiler.set_stance("force_eager"))  # compiled blocks pass hooks by
        model.loss(tokens, labels, documents, reduction="sum")
    return tuple(_plain(memory) for memory in found)


def _looking(name: str, found: list[dict[str, Any]]) -> Callable:
    """A forward hook: that is when the weights are here, also where they are cut over ranks."""
    *_, layer, memory = name.split(".")

    def hook(module: ContextualMemory, inputs: tuple[Tensor, Packing, int], _output: Tensor) -> None:
        found.append({"layer": int(layer), "memory": memory} | look(module, *inputs))

    return hook


def look(memory: ContextualMemory, y_BTd: Tensor, packing: Packing, delay: int) -> dict[str, Tensor]:
    """The quantities of one memory, for the first row of its input."""
    y_1Td = y_BTd[:1]
    row = Packing(*(None if part is None else part[:1] for part in (packing.starts, packing.resets)))
    base, slope, exponent = memory.bandwidth()
    keys_1THD, log_gate_1TH, log_decay_1TH = memory.keys(y_1Td, row.resets)
    keys_THD = keys_1THD[0].float()
    first_T, last_T = (part.expand(1, -1)[0] for part in _intervals(memory, row, delay, y_1Td))
    at = _positions(last_T - first_T + 1)
    return {
        "bandwidth_base": base,
        "bandwidth_slope": slope,
        "bandwidth_exponent": exponent,
        "value_scale": memory.value_scale(),
        "value_mix": memory.value_mix.float().clone(),  # the gathered one is gone once the block has run
        "log_gate": log_gate_1TH[0, at].float(),
        "decay": log_decay_1TH[0, at].float().exp(),
        "entropy": entropies(keys_THD, at, first_T[at], last_T[at], base, slope, exponent).mean(0),
    }


def _intervals(memory: ContextualMemory, row: Packing, delay: int, y_1Td: Tensor) -> tuple[Tensor, Tensor]:
    length = y_1Td.shape[1]
    return intervals(row.starts, memory.window, delay, 0, (1, length, length), y_1Td.device)


def _positions(count_T: Tensor) -> Tensor:
    """Up to POSITIONS of them, spread evenly over those that read at least two pairs."""
    reading = (count_T >= 2).nonzero()[:, 0]
    wanted = min(POSITIONS, len(reading))
    return reading[torch.linspace(0, len(reading) - 1, wanted, device=reading.device).round().long()]


def entropies(keys_THD: Tensor, at_Q: Tensor, first_Q: Tensor, last_Q: Tensor, base: Tensor, slope: Tensor,
              exponent: Tensor) -> Tensor:  # fmt: skip
    """Entropy of the weights that each query gives the pairs it reads, over log n: [Q, H] in [0, 1].

    at: the queries' positions; first, last: the pairs each reads, at least two.
    """
    count_Q = last_Q - first_Q + 1
    beta_QH = bandwidth(count_Q[None], base, slope, exponent)[0]
    scores_HQT = torch.einsum("qhd,thd->hqt", keys_THD[at_Q] * beta_QH[..., None], keys_THD)
    pair_T = torch.arange(len(keys_THD), device=at_Q.device)
    closed_QT = (pair_T < first_Q[:, None]) | (pair_T > last_Q[:, None])
    logs = scores_HQT.masked_fill(closed_QT, -torch.inf).log_softmax(-1)
    terms = (logs.exp() * logs).masked_fill(closed_QT, 0.0)
    return (-terms.sum(-1) / count_Q.log()).T


def _plain(memory: dict[str, Any]) -> dict[str, Any]:
    return {key: value.flatten().tolist() if isinstance(value, Tensor) else value for key, value in memory.items()}

"""A tiny mosaic on several ranks, sharded as training shards it, with an AdamW that needs no forward pass.

Gradients are drawn from a seed for each weight and step, and AdamW works element by element, so every number of ranks
makes the very same updates: what differs after a resumption, differs because of the checkpoint.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.rows import held
from mmcore.checkpoint.store import load_state
from mmcore.checkpoint.writer import CheckpointWriter
from mmcore.config import ModelConfig
from mmcore.distributed.mesh import World
from mmcore.model import build_model

ODD = ModelConfig(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
"""37 rows over 2, 3 or 4 ranks, 2 rows (heads) over 3: uneven everywhere, some ranks without a row."""


class Toy:
    """A model, its optimizer, and the step it is at."""

    def __init__(self, world: World, config: ModelConfig = ODD, hybrid: bool = False):
        self.world, self.config, self.step = world, config, 0
        self.model = build_model(config)
        self.model.init_weights(0)
        if world.size > 1:
            shape, names = ((2, world.size // 2), ("replicate", "shard")) if hybrid else ((world.size,), ("shard",))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, foreach=False)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            for name, parameter in self.model.named_parameters():
                seed = int.from_bytes(hashlib.sha256(f"{self.step} {name}".encode()).digest()[:6])
                gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                rows = held(name, parameter)
                if self.world.size > 1:  # (distribute_tensor would be a collective for each weight)
                    gradient = DTensor.from_local(
                        gradient[rows.start : rows.stop].clone(), parameter.device_mesh, parameter.placements,
                        run_check=False, shape=parameter.shape, stride=parameter.stride(),
                    )  # fmt: skip
                parameter.grad = gradient
            self.optimizer.step()

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and moments by name, plain or sharded, as they are (not copied)."""
        named = dict(self.model.named_parameters())
        moments = {
            f"{moment}.{name}": self.optimizer.state[p][moment]
            for moment in ("exp_avg", "exp_avg_sq")
            for name, p in named.items()
            if p in self.optimizer.state
        }
        return named, moments

    def whole(self) -> dict[str, Tensor]:
        """Weights and moments gathered on every rank, copied."""
        named, moments = self.tensors()
        return {
            name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in (named | moments).items()
        }

    def digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.whole().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, writer: CheckpointWriter, **options: Any) -> None:
        model, moments = self.tensors()
        state = {"sample_position": 8 * self.step, "optimizer_steps": self.step}
        writer.save(self.step, model=model, optimizer=moments, state=state,
                    config=config_json(self.config, torch.float32, 1, 2), files={"recipe.yaml": b"name: toy\n"},
                    **options)  # fmt: skip

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        saved = load_state(path)
        for name, parameter in self.model.named_parameters():
            saved.read_into(name, parameter)
            moments = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
            for moment, tensor in moments.items():
                saved.read_into(f"{moment}.{name}", tensor)
            self.optimizer.state[parameter] = {"step": torch.tensor(float(saved.state["optimizer_steps"]))} | moments
        self.step = saved.step


def writer(run: Path, world: World, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(run, world, **{"keep_last": 0, "asynchronous": False, **options})


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}

"""What one, two, three and four ranks must compute alike: a few updates of tiny models, cut over worlds of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmcore.checkpoint.formats import open_checkpoint
from mmcore.config import DistributedConfig, ModelConfig, TrainingConfig, build_recipe
from mmcore.distributed import together
from mmcore.distributed.mesh import World, start_world, stop_world
from mmcore.distributed.reduce import agreed, total
from mmcore.distributed.shards import whole
from mmcore.distributed.together import all_or_none, in_turn, on_first
from mmcore.errors import ConfigError, DataError
from mmcore.training.events import StepDone, Validated
from mmcore.training.optimizer import build_optimizer
from mmcore.training.setup import build, prepare_trainer
from mmcore.training.step import accumulate, clip
from mmcore.training.validation import held_out_loss

VOCABULARY, WIDTH, INNER, LENGTH = 509, 40, 68, 33
"""509 is a prime; 40 and 68 divide by 2 and 4, not by 3."""
ROWS = 12  # sequences in a step: 1, 2, 3 or 4 ranks


@dataclass(frozen=True)
class Scenario:
    model: dict[str, Any] = field(default_factory=dict)
    distributed: dict[str, Any] = field(default_factory=dict)
    micro_batch: int = 3
    precision: str = "fp32"
    steps: int = 2
    compile: bool = False


@dataclass
class Batch:
    tokens: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor


@dataclass
class Result:
    losses: list[float]
    norms: list[float]
    counts: list[int]
    gradients: dict[str, np.ndarray]
    """Of the first step, before clipping."""
    start: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    validation: tuple[float, int]
    collectives: dict[str, int] = field(default_factory=dict)
    """Calls in the first step, by name."""
    largest_built: int = 0
    """Elements of the largest tensor that building the model made."""


def config(scenario: Scenario) -> ModelConfig:
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=2,
        short_term_window=9, long_term_delay=4, long_term_delay_range=(4, 9), max_position_embeddings=LENGTH,
    )  # fmt: skip
    return ModelConfig(**(settings | scenario.model))


def rows(seed: int, count: int = ROWS) -> Batch:
    """Packed documents of random lengths; every row has labels that do not count, and a different number of them."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH + 1), generator=draw)
    starts = torch.rand(count, LENGTH + 1, generator=draw) < 0.15
    documents = starts.cumsum(dim=1).to(torch.int32)
    labels = torch.where(documents[:, 1:] == documents[:, :-1], tokens[:, 1:], -100)
    for row in range(count):
        labels[row, : int(torch.randint(0, 2 * row + 1, (), generator=draw))] = -100
    return Batch(tokens[:, :-1].contiguous(), labels, documents[:, :-1].contiguous())


def cut(batch: Batch, size: int) -> list[Batch]:
    parts = (part.split(size) for part in (batch.tokens, batch.labels, batch.documents))
    return [Batch(*pieces) for pieces in zip(*parts, strict=True)]


def train(scenario: Scenario, world: World) -> Result:
    """The updates of `scenario` on this rank; whole tensors come back on every rank."""
    recipe = build_recipe({
        "model": dataclasses.asdict(config(scenario)) | {"rope_scaling": None},
        "training": {"batch_size": ROWS, "micro_batch_size": scenario.micro_batch, "steps": 9, "compile": scenario.compile},
        "distributed": scenario.distributed,
    })  # fmt: skip
    device = torch.device("cpu")
    with Largest() as largest:
        model = build(recipe, device, scenario.precision, world=world)
    result = Result([], [], [], {}, everything(model), {}, (0.0, 0), largest_built=largest.elements)
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=1e-2))
    share = ROWS // world.size
    for step in range(scenario.steps):
        mine = cut(rows(step), share)[world.rank]
        optimizer.zero_grad(set_to_none=True)
        # torch.compile under a dispatch mode ends in a segmentation fault (2.13)
        with Collectives() if step == 0 and not scenario.compile else contextlib.nullcontext() as collectives:
            found = accumulate(
                model, cut(mine, scenario.micro_batch), 5, device, scenario.precision, world, recipe.distributed
            )
        result.losses.append(found.loss)
        result.norms.append(found.gradient_norm)
        result.counts.append(found.trained_tokens)
        if step == 0:
            result.collectives = dict(collectives.calls) if collectives else {}
            result.gradients = {name: whole(p.grad).numpy().copy() for name, p in model.named_parameters()}
        clip(model, found.gradient_norm, 0.5 * found.gradient_norm)
        optimizer.step()
    held_out = cut(rows(99, 5), 1)  # five batches divide by one rank alone
    result.validation = held_out_loss(model, held_out, device, scenario.precision, world=world)
    result.weights = everything(model)
    return result


class Collectives(TorchDispatchMode):
    """Counts calls to other ranks."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made off the meta device."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and type(tensor) is torch.Tensor:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def everything(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: whole(p.detach()).numpy().copy() for name, p in model.named_parameters()}


def part_of(world: World, ranks: int, copies: int = 1) -> World | None:
    """The first `ranks` of `world` as a world of their own; None for the others. Every rank must call this."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    control = dist.new_group(list(range(ranks)), backend="gloo")
    shape = torch.arange(ranks) if copies == 1 else torch.arange(ranks).view(copies, -1)
    mesh = DeviceMesh("cpu", shape, mesh_dim_names=("shard",) if copies == 1 else ("replicate", "shard"))
    if world.rank >= ranks:
        return None
    return dataclasses.replace(world, size=ranks, local_size=ranks, mesh=mesh, control=control)


def run_all(work: dict[str, tuple[Scenario, int, int]], source: str, values: dict[str, Any]) -> tuple[dict, dict, dict]:
    """On one of four ranks: every (scenario, ranks, copies), whose results rank 0 returns; `talk`; and the weights that
    a model of the recipe `values` has once it was filled from the checkpoint `source`."""
    world = start_world(torch.device("cpu"), DistributedConfig(timeout_seconds=240))
    try:
        heard = talk(world)
        worlds = {key: part_of(world, *key) for key in sorted({(ranks, copies) for _, ranks, copies in work.values()})}
        found = {}
        for name, (scenario, ranks, copies) in work.items():
            inside = worlds[ranks, copies]
            if inside is not None:
                found[name] = train(scenario, inside)
        recipe = build_recipe(values)
        filled = everything(build(recipe, torch.device("cpu"), "fp32", open_checkpoint(source), world))
    finally:
        stop_world(world)
    return (found if world.is_first else {}), heard, (filled if world.is_first else {})


def talk(world: World) -> dict[str, Any]:
    """What this rank hears of work and mistakes of the others."""
    heard: dict[str, Any] = {}
    heard["first"] = on_first(world, lambda: {"made by": world.rank})
    order: list[float] = []
    in_turn(world, lambda: order.append(time.time()))
    heard["turn"] = order[0]
    patient = dataclasses.replace(world, timeout_seconds=2.0)
    agreed(False, world)  # all begin together
    heard["slow"] = on_first(patient, lambda: time.sleep(4.0))  # twice what a message may take

    def fail(error: Exception) -> None:
        raise error

    def told(call: Callable[[], Any]) -> str:
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    def alone(rank: int, error: Exception) -> None:
        with all_or_none(world):
            if world.rank == rank:
                raise error

    heard["mistake"] = told(lambda: on_first(world, lambda: fail(DataError("no text"))))
    heard["failure"] = told(lambda: on_first(world, lambda: fail(KeyError("x"))))
    heard["alone"] = told(lambda: alone(2, ConfigError("too little memory")))
    heard["silent"] = told(lambda: together._await(patient, "never", 3))
    heard["sum"] = total(torch.tensor(float(world.rank + 1)), world).item()
    heard["agreed"] = (agreed(world.rank == 1, world), agreed(False, world))
    return heard


def trained(values: dict[str, Any]) -> list[tuple]:
    """A run from a recipe's values, as `mm` makes it: (step, loss, gradient norm) and validation losses, as told to the
    listeners of this rank."""
    heard: list[tuple] = []

    def listen(event: Any) -> None:
        if isinstance(event, StepDone):
            heard.append((event.step, event.loss, event.gradient_norm))
        elif isinstance(event, Validated):
            heard.append((event.step, event.loss))

    outcome = prepare_trainer(build_recipe(values), listeners=[listen]).fit()
    assert outcome.status == "done"
    return heard

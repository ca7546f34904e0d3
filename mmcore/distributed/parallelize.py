"""Recomputation, compilation and sharding, applied to a model from outside, in this order.

All act on modules in place, so that parameter names, and with them checkpoints, stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmcore.config import DistributedConfig
from mmcore.distributed.mesh import World
from mmcore.distributed.rounding import round_once_a_step
from mmcore.errors import ConfigError
from mmcore.kernels.linear.cpu import multiplies_bf16
from mmcore.kernels.recompute import remake


def parallelize(
    model: nn.Module,
    distributed: DistributedConfig,
    compile_blocks: bool = False,
    world: World | None = None,
    precision: str = "fp32",
) -> nn.Module:
    """Apply the recipe's activation checkpointing, compilation and sharding to `model`, and return it.

    Activation checkpointing: full keeps a block's input alone and runs the block a second time in the backward pass,
    about a third more arithmetic. Selective (`recompute.remake`) makes again what costs no product: norms, look-ahead
    values, SwiGLU's product, and the memories' reads side by side. Bytes that a block of the 8b keeps for a token with
    none, selective, full: in fp32 403,000, 247,000, 16,400; in bf16 251,000, 190,000, 16,400 (accounting.py's formula, which
    the tests hold within 10 % of what stays alive). Keys are kept: the scan's own backward pass needs them finished.
    In compiled blocks the compiler chooses what it makes again; selective lets it choose also what a product of the backward
    pass will read (`_sparing`). A single process under a GPU's autocast rounds weights once a step (`rounding`). Of several
    ranks each holds its rows of every parameter, a DTensor (`shard`); the model may then be on the meta device
    still. Raises ConfigError for cpu_offload in a single process.
    """
    world = world or World()
    if distributed.cpu_offload and world.size == 1:
        raise ConfigError(
            "distributed.cpu_offload moves the shares of several ranks to host memory, and this is one process: leave it "
            "out, or start more ranks"
        )
    for block in model.model.layers:
        if distributed.activation_checkpointing == "full":
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if distributed.activation_checkpointing == "selective" and not compile_blocks:
            block.forward = remake(block.forward)
        if compile_blocks:
            # The method and not the module: hooks that gather weights stay outside of what is compiled
            sparing = distributed.activation_checkpointing == "selective"
            block.forward = torch.compile(block.forward, backend=_sparing) if sparing else torch.compile(block.forward)
        if world.size == 1 and distributed.activation_checkpointing != "full":  # which keeps as little as it can
            round_once_a_step(block)
    if world.size > 1:
        shard(model, distributed, world, precision)
    return model


def _sparing(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
    """torch.compile's own backend, which may make again what it has fused even where a matrix product of the backward pass
    reads it, and it has to be written once more: what projections read, SwiGLU's product."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(ban_recompute_materialized_backward=False):
        return compile_fx(graph, inputs)


def shard(model: nn.Module, distributed: DistributedConfig, world: World, precision: str) -> None:
    """Cut the parameters of `model` over the ranks of `world.mesh`, in place (FSDP2).

    Four kinds of groups, each gathered by one collective: every block's matrices; the embedding; the classifier; and
    in the root all vectors of the model (norms and per-head scalars, 0.02 % of an 8b) with the matrix that embedding and
    classifier share where they are tied. Under bf16 matrices travel and are used in bf16, while the vectors stay in
    fp32: a bandwidth's exponent rounded to 8 bits would be off by a percent. A CPU that multiplies bf16 rounds what its
    products are given, and there all travel in fp32. Gradients are added up in fp32, not averaged: the loss is divided by
    the global number of labels before (training/step.py).
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method as gather_around

    offload = CPUOffloadPolicy(pin_memory=world.mesh.device_type == "cuda") if distributed.cpu_offload else OffloadPolicy()
    wide_everywhere = precision == "fp32" or (world.mesh.device_type == "cpu" and multiplies_bf16())
    dtype = None if wide_everywhere else torch.bfloat16
    # Autocast chooses the dtype of each operation, as in a single process: inputs are left as they are
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    common = {"mesh": world.mesh, "offload_policy": offload}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    ends = [] if tied else [model.model.embed_tokens, model.lm_head]
    matrices = {p for module in (*model.model.layers, *ends) for p in module.parameters() if p.ndim > 1}

    # The root first, or its group could not hold vectors of modules that have groups of their own
    fully_shard(model, mp_policy=wide, reshard_after_forward=False, ignored_params=matrices, **common)
    vectors = set(model.parameters()) - matrices
    for module in (*model.model.layers, *ends):
        # The classifier is used last in the forward pass and first in the backward pass: it stays in between
        fully_shard(
            module, mp_policy=narrow, reshard_after_forward=module is not model.lm_head, ignored_params=vectors, **common
        )
    if not tied:
        model.model.embed_tokens.set_unshard_in_backward(False)  # a look-up needs no weights for its gradient
        gather_around(model.lm_head, "loss")
    gather_around(model, "loss")
    for group in _groups(model):
        group.set_force_sum_reduction_for_comms(True)
        group.set_gradient_divide_factor(1.0)


def micro_batch(model: nn.Module, distributed: DistributedConfig, last: bool) -> None:
    """Say before a backward pass whether it is the `last` of a step, after which gradients must be whole.

    See DistributedConfig.gradient_reduction. A model of a single process needs no telling.
    """
    if not _is_group(model):
        return
    model.set_is_last_backward(last)
    model.set_requires_gradient_sync(last or distributed.gradient_reduction == "micro_batch")
    model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Let go of the weights that a forward pass without a backward pass has left gathered."""
    for group in _groups(model):
        group.reshard()


def _groups(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_group(module)]


def _is_group(module: nn.Module) -> bool:
    return hasattr(module, "set_requires_gradient_sync")

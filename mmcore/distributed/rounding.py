"""Weights rounded once a step, for training on one GPU.

Under autocast each product rounds its weight anew: in every micro-batch 9 GB of memory traffic for the 1.5b. Here a block's
matrices lie rounded beside the exact ones and are shown to their products while the block runs, in forward passes that take
gradients: where weights are swapped for a while, to be evaluated, none is used.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from mmcore.model.layers import Linear


class _Kept(NamedTuple):
    rounded: Tensor
    when: tuple
    """What the weight was then: its place, its version, the optimizers' steps, and the dtype that was wanted."""


_kept = WeakTensorKeyDictionary()
"""Parameter -> _Kept, for as long as the parameter lives. Not in the modules, which are copied, pickled and saved."""

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Fused optimizers change a weight and leave its version as it was (torch 2.11 to 2.13).
register_optimizer_step_post_hook(_count_step)


def round_once_a_step(block: nn.Module) -> None:
    """Have the Linears of `block` rounded before its forward passes, by hooks around them. Seen are optimizers' steps,
    anyone's, writes to a weight, and other tensors in its place; a write through `.data` is not, before the next step."""
    # Looked for once: each time it took 0.15 ms of a host, which asks for a layer in less than one. A copy of the block has
    # the hooks with the copies of its Linears.
    linears = [module for module in block.modules() if isinstance(module, Linear)]
    show, hide = functools.partial(_show, linears), functools.partial(_hide, linears)
    show.training_only = hide.training_only = True  # of no concern to the compiled step of decoding
    block.register_forward_pre_hook(show)
    block.register_forward_hook(hide, always_call=True)


def _show(linears: list[Linear], _block: nn.Module, _inputs: Any) -> None:
    wanted = torch.is_autocast_enabled("cuda") and torch.is_grad_enabled() and torch.version.hip is None
    if not wanted or torch.compiler.is_compiling():
        return
    dtype = torch.get_autocast_dtype("cuda")
    for linear in linears:
        if linear.weight.dtype is torch.float32:
            linear._buffers["rounded"] = rounded(linear.weight, dtype)  # a module sets registered buffers slowly


def _hide(linears: list[Linear], _block: nn.Module, _inputs: Any, _output: Any) -> None:
    if not torch.compiler.is_compiling():
        for linear in linears:
            linear._buffers["rounded"] = None


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight`, fp32, in `dtype`, as it was rounded the last time if it has not changed since. What is made anew is another
    tensor, for graphs of before may still want the old one."""
    when = (dtype, weight.data_ptr(), weight._version, _optimizer_steps)
    kept = _kept.get(weight)
    if kept is None or kept.when != when:
        kept = None
        _kept.pop(weight, None)  # its memory is the new one's
        kept = _kept[weight] = _Kept(weight.detach().to(dtype), when)
    return kept.rounded

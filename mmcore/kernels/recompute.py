"""Results that are cheaper to make again than to keep: selective activation checkpointing.

torch.utils.checkpoint makes a stretch of the forward pass again, the products in it included, and its selective form
chooses among operations of aten, which the compiled CPU kernels are not. Here single tensors are chosen. A function
decorated with `cheap` tells what it made of what; where such a result is about to be saved for the backward pass
inside `remake`, its inputs are noted instead, and the first operation that asks for it has it made again. Every
other operation runs once, whatever it is written in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_made: ContextVar[dict | None] = ContextVar("made", default=None)
"""Inside `remake`: place in memory -> (result of a cheap function, its Recipe). The results stay there until the block's
forward pass is over, so that no other tensor can take their place."""


class Recipe:
    """How to make one tensor again. The result is kept from the first time it is asked for until the last saved
    reference to it is gone."""

    def __init__(self, function: Callable[..., Tensor], arguments: tuple, options: dict[str, Any], result: Tensor):
        self._function = function
        self._arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        self._options = options
        kind = result.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._again: Tensor | None = None

    def make(self) -> Tensor:
        if self._again is None:
            kind, dtype, enabled = self._autocast
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                self._again = self._function(*self._arguments, **self._options)
        return self._again


def cheap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Mark a function of tensors (given by position) and options whose result may be made again in the backward pass."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Tensor:
        result = function(*arguments, **options)
        made = None if torch.compiler.is_compiling() else _made.get()
        if made is not None and result.requires_grad and result.is_contiguous():
            made[_place(result)] = (result, Recipe(function, arguments, options, result))
        return result

    return call


def remake(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` with the results of cheap functions forgotten between the forward and the backward pass."""

    @functools.wraps(forward)
    def call(*arguments: Any, **options: Any) -> Tensor:
        made: dict[tuple, tuple[Tensor, Recipe]] = {}

        def pack(tensor: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
            found = made.get(_place(tensor)) if tensor.is_contiguous() else None
            return tensor if found is None else (found[1], tensor.shape)  # products flatten what they are given

        token = _made.set(made)
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
                return forward(*arguments, **options)
        finally:
            _made.reset(token)
            made.clear()

    return call


def _unpack(kept: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    recipe, shape = kept
    return recipe.make().view(shape)


def _place(tensor: Tensor) -> tuple:
    """Where a contiguous tensor lies, whatever its shape."""
    return tensor.data_ptr(), tensor.dtype, tensor.numel()

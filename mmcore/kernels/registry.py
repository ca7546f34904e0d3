"""Kernels as operators of PyTorch, `torch.ops.mm.<kernel>_<form>`: one mechanism for all of them.

torch.compile cannot look into C or Triton, and needs not: an operator says what shapes come out (`fake`) and which
operator gives its gradients. Graphs then hold the call whole (fullgraph=True), FSDP2 and activation checkpointing see
plain differentiable calls, and a selective checkpointing policy can name them (`operators`).

Calls through PyTorch's dispatcher cost some 10 us in Python. Decoding, which makes many small calls without gradients,
does without: where `direct` says so, a form calls its C function at once.

A graph that torch.compile keeps on disk knows an operator by its name alone. So what is compiled here is kept apart by the
source of the kernels: another version's graphs, whose operators may give other shapes, are never taken for this one's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor
from torch._C import DispatchKey, _is_tracing, _len_torch_dispatch_stack
from torch._C import _dispatch_tls_is_dispatch_key_included as _is_included
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("mm", "DEF")
_DEVICES = ("CPU", "CUDA")
_PRE_DISPATCH = DispatchKey.PreDispatch  # set while make_fx looks on above autograd
_DIFFERENTIABLE: dict[str, Any] = {}


def _version() -> str:
    """A hash of all kernels' Python, where operators are defined."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


torch.compiler.config.cache_key_tag += f"mm-{_version()}"


def operator(
    signature: str,
    run: Callable,
    fake: Callable,
    *,
    keep: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define `mm::<signature>`, say `mm::double(Tensor x) -> Tensor`, and return the operator to call, or where it has
    gradients a function that calls it.

    run: what it computes, on tensors of any device that it is called with. It changes no input, and no output shares
        memory with an input or another output. All outputs are contiguous.
    fake: the same for tensors without data: outputs of the right shape, dtype and device.
    keep(ctx, inputs, outputs): saves what `backward(ctx, *gradients)` needs. The gradient of an output that is marked
        non-differentiable comes as None. Both are given where the operator has gradients; they exist once: a gradient
        of a gradient is refused. So that it is, whichever tensor it is asked for, every input that has a gradient is
        among the tensors that are saved, or one of them was computed from it. Forward-mode derivatives are refused.
    """
    name = signature.partition("(")[0]
    _LIBRARY.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
    for device in _DEVICES:
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"mm::{name}", fake, lib=_LIBRARY)
    made = getattr(torch.ops.mm, name).default
    if backward is None:
        return made

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, output)

    once = differentiable_once(name, backward)

    def gradients(ctx, *given):
        if all(g is None for g in given):
            return (None,) * len(ctx.needs_input_grad)
        return once(ctx, *given)

    def call(*arguments):
        refuse_tangents(name, arguments)
        return made(*arguments)

    torch.library.register_autograd(f"mm::{name}", gradients, setup_context=setup, lib=_LIBRARY)
    _DIFFERENTIABLE[name] = made
    return call


_REMEDY = "start Python with MM_KERNELS=reference in its environment, and leave `kernels` and `implementation` at 'auto'"


def differentiable_once(name: str, backward: Callable) -> Callable:
    """`backward(ctx, *gradients)` of an autograd function, with gradients that refuse to have any themselves.

    PyTorch's once_differentiable takes what was saved for constants, and its refusal is met by .backward() alone:
    autograd.grad only goes where the tensors asked for lie, and would leave out what goes through here in silence. So
    the refusal lies on the ways to all tensors that a gradient was computed from.
    """

    def gradients(ctx, *given):
        refuse_tangents(name, given)
        if not torch.is_grad_enabled():
            return backward(ctx, *given)
        unpacked = _Unpacked(ctx)
        with torch.no_grad():
            found = backward(unpacked, *given)
        return _without_gradients(found, name, (*given, *unpacked.saved_tensors))

    return gradients


class _Unpacked:
    """A context whose saved tensors may be asked for again; under activation checkpointing they can be unpacked once."""

    def __init__(self, ctx: Any) -> None:
        self.saved_tensors, self._ctx = ctx.saved_tensors, ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _without_gradients(found: Any, name: str, sources: tuple) -> Any:
    """Gradients, and lists of them for inputs that are lists, as ones that refuse to have any with regard to `sources`."""
    if isinstance(found, (list, tuple)):
        return type(found)(_without_gradients(part, name, sources) for part in found)
    return found if found is None else _Last.apply(found, name, *_flat(sources))


def _flat(tensors: Any) -> Iterator[Any]:
    """What is in a tuple and in the lists in it."""
    for part in tensors:
        yield from part if isinstance(part, (list, tuple)) else (part,)


class _Last(torch.autograd.Function):
    """A gradient that has none itself, computed from `sources`."""

    @staticmethod
    def forward(ctx, gradient, name, *sources):
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"mm::{ctx.name} has no second derivatives: {_REMEDY}")


def refuse_tangents(name: str, arguments: tuple) -> None:
    """Raises RuntimeError where forward-mode derivatives are taken (torch.func.jvp, dual tensors) with regard to one of the
    arguments: what has no rule for them would drop them in silence."""
    if forward_ad._current_level < 0:
        return
    tensors = (part for part in _flat(arguments) if isinstance(part, Tensor))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(f"mm::{name} has no forward-mode derivatives: {_REMEDY}")


def operators(*kernels: str) -> tuple[Any, ...]:
    """The operators, in all forms known so far, whose results are kept when a policy wants those of `kernels` kept:
    `operators("memory_read", "gated_scan")`. Forms in Triton are known from their first use on."""
    return tuple(made for name, made in _DIFFERENTIABLE.items() if name.rsplit("_", 1)[0] in kernels)


def direct(x: Tensor) -> bool:
    """Whether a call on `x` may pass by the dispatcher: no gradient is recorded, nobody looks on, the data is real."""
    return not torch.is_grad_enabled() and type(x) is Tensor and not watched()


def watched() -> bool:
    """Whether calls are to be seen: by torch.compile, torch.jit.trace, make_fx, a mode such as FlopCounterMode's, or
    forward-mode differentiation."""
    # Asked some ten times a layer and token: 0.2 us, of what can be known in so little.
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
        return True
    return _is_tracing() or _is_included(_PRE_DISPATCH)

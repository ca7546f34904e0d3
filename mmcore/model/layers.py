"""Layers that the architectures share: projections, norms, persistent memory, initialization."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcore.kernels.dispatch import autocasting
from mmcore.kernels.linear import linear
from mmcore.kernels.linear.cpu import rounding
from mmcore.kernels.mosaic_step import Matrix
from mmcore.kernels.recompute import cheap
from mmcore.kernels.rms_norm import rms_norm
from mmcore.kernels.swiglu import swiglu
from mmcore.kernels.thin_linear import MOST_ROWS, thin_linear


class Linear(nn.Linear):
    """A projection, built without bias: [..., in] -> [..., out]. A `bias` that it is given later is added.

    Without gradients on a CPU, few rows take the bandwidth-bound kernel, and bf16 weights (half the bytes of a
    decoding step) meet fp32 activations. `quantize` leaves a quarter of the bytes.
    """

    scale: Tensor | None
    """fp32 [out], the scales of the rows of an int8 weight; None for any other."""

    rounded: Tensor | None
    """The weight as autocast rounds it, while a forward pass has it at hand (`mmcore.distributed.rounding`); else None."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("scale", None)
        self.register_buffer("rounded", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _products(x, [self])[0]
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Whatever dtype a model is taken to, scales stay fp32, as kernels read them."""
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and not scale.is_meta and self.scale.dtype is not scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def matrix(self) -> Matrix:
        """The weight as kernels take it."""
        return Matrix(self.weight, self.scale)

    def exact_weight(self) -> Tensor:
        """The weight that the products are with, [out, in]; of int8, made anew in fp32."""
        return self.weight if self.scale is None else self.weight * self.scale[:, None]

    def quantize(self) -> None:
        """Keep the weight in int8 with an fp32 scale for each row, for inference. Activations keep 16 bits or more.

        Row o of the weight w becomes round(127 w / max|w|) with the scale max|w| / 127: no entry moves by more than half
        a scale. One that is in int8 stays as it is.
        """
        if self.scale is not None:
            return
        exact = self.weight.detach().float()
        scale = exact.abs().amax(dim=1) / 127
        steps = torch.where(scale > 0, scale, torch.ones_like(scale))
        del self.weight
        self.register_buffer("weight", (exact / steps[:, None]).round().to(torch.int8))
        self.scale = scale

    def reset_parameters(self) -> None:
        """Left unset: `init_weights` draws every parameter, also after a build on the meta device."""


def hooked(module: nn.Module) -> bool:
    """Whether something is to be called with the module: pruning, steering, whoever looks at activations. Not what says of
    itself that it is `training_only`."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(kinds) and any(not getattr(hook, "training_only", False) for kind in kinds for hook in kind.values())


def advanced(module: nn.Module, *arguments: Any) -> Tensor:
    """module.advance(*arguments), called as the module itself is: with its forward hooks."""
    if not hooked(module):
        return module.advance(*arguments)
    for number, hook in module._forward_pre_hooks.items():
        more = ({},) if number in module._forward_pre_hooks_with_kwargs else ()
        changed = hook(module, arguments, *more)
        if changed is not None:
            changed = changed[0] if more else changed
            arguments = (*changed, *arguments[len(changed) :]) if isinstance(changed, tuple) else (changed, *arguments[1:])
    result = module.advance(*arguments)
    for number, hook in module._forward_hooks.items():
        more = ({},) if number in module._forward_hooks_with_kwargs else ()
        changed = hook(module, arguments, *more, result)
        result = result if changed is None else changed
    return result


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what Linear does and nothing else, so that its weight is all there is to know."""
    return (
        isinstance(layer, Linear) and type(layer).forward is Linear.forward and "forward" not in layer.__dict__
        and layer._parameters["bias"] is None and not hooked(layer)  # layer.bias takes nn.Module 0.4 us to find
    )  # fmt: skip


def project(x: Tensor, *layers: nn.Module, narrow: bool = False) -> list[Tensor]:
    """Several projections of one input, as one product where they are plain: [..., in] -> [..., out] each. What has taken
    a Linear's place (float8, an adapter) is called as it is. `narrow`: they are wanted in the dtype of autocast on a CPU
    too."""
    if not all(map(is_plain, layers)):
        return _alike([layer(x) for layer in layers])
    return _products(x, layers, narrow)


def _alike(parts: list[Tensor]) -> list[Tensor]:
    """All in the widest dtype of theirs: under autocast some products may be in its dtype and others in fp32, and what reads
    them wants one."""
    widest = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return [part.to(widest) for part in parts]


def _products(x: Tensor, layers: Sequence[Linear], narrow: bool = False) -> list[Tensor]:
    # An exported program is for any number of rows.
    inference = x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_exporting()
    if inference and x.numel() <= MOST_ROWS * x.shape[-1]:
        return [thin_linear(x, layer.weight, layer.scale) for layer in layers]
    scales, rounded = ([layer._buffers[name] for layer in layers] for name in ("scale", "rounded"))
    bare = [scale is None for scale in scales]
    if any(bare) and not all(bare):  # quantized in part: a product is of weights of one kind
        return _alike([_products(x, [layer], narrow)[0] for layer in layers])
    return linear(
        x, [layer.weight for layer in layers], None if any(bare) else scales, narrow=narrow,
        rounded=None if all(part is None for part in rounded) else rounded,
    )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in fp32: [..., d] -> [..., d]."""

    def __init__(self, width: int, eps: float, kernels: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return _normalized(x, self.weight, eps=self.eps, kernels=self.kernels)


@cheap
def _normalized(x: Tensor, weight: Tensor, *, eps: float, kernels: str) -> Tensor:
    """RMSNorm's equation. Under autocast the result is cast at once, for each projection would make a copy of its own; but
    for products that round what they read."""
    y = rms_norm(x, weight, eps, implementation=kernels)
    kind = y.device.type
    cast = autocasting(kind) and not (y.is_cpu and rounding())
    return y.to(torch.get_autocast_dtype(kind)) if cast else y


_gated = cheap(swiglu)


class LayerNorm(nn.Module):
    """scale * ((x - mean(x)) / sqrt(var(x) + eps) * weight + bias), statistics in fp32: [..., d] -> [..., d]."""

    def __init__(self, width: int, eps: float, bias: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.eps = eps
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)
        return y if self.scale == 1.0 else y * self.scale


class PersistentMemory(nn.Module):
    """SwiGLU, W_2(SiLU(W_1 y) * W_3 y): memory whose pairs are fixed by training. [..., d] -> [..., d]."""

    def __init__(self, width: int, inner: int, kernels: str = "auto") -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)
        self.kernels = kernels

    def forward(self, y: Tensor) -> Tensor:
        gate, up = project(y, self.gate_proj, self.up_proj, narrow=True)
        return self.down_proj(_gated(gate, up, implementation=self.kernels))

    @torch.no_grad()
    def init_weights(self, name: str, depth: int, seed: int) -> None:
        """Table 6; W_2 counts d', the width of what it reads."""
        for part, layer in self.named_children():
            draw_normal(f"{name}.{part}", layer.weight, fan_in_sigma(layer.in_features, depth), seed)


def draw_normal(name: str, weight: Tensor, sigma: float, seed: int) -> None:
    """Fill `weight` from a normal of deviation `sigma`, cut off at 3 sigma.

    The draw depends on the seed, the parameter's name and the row alone: not on the order of drawing, the device, or
    which rows a process holds (`drawing_rows`).
    """
    _draw(name, weight, seed, lambda rows, generator: nn.init.trunc_normal_(
        rows, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator))  # fmt: skip


def draw_uniform(name: str, weight: Tensor, seed: int) -> None:
    """Fill `weight` uniformly from [0, 1), drawn as in `draw_normal`."""
    _draw(name, weight, seed, lambda rows, generator: rows.uniform_(0, 1, generator=generator))


DRAWN_ROWS = 64
"""Rows drawn from one generator. A process draws at most two of these blocks in vain for each of its tensors; seeding
costs 10 us a block, 20 ms for the largest vocabularies."""

RowsHeld = Callable[[Tensor], tuple[Tensor, int]]
_rows_held: ContextVar[RowsHeld] = ContextVar("rows_held", default=lambda weight: (weight, 0))


@contextlib.contextmanager
def drawing_rows(rows_held: RowsHeld) -> Iterator[None]:
    """Draw into what `rows_held` says that this process has of a parameter: the rows, and the number of the first."""
    token = _rows_held.set(rows_held)
    try:
        yield
    finally:
        _rows_held.reset(token)


def _draw(name: str, weight: Tensor, seed: int, fill: Callable[[Tensor, torch.Generator], Tensor]) -> None:
    """Block by block on the CPU, whose generator is the same everywhere; a GPU's depends on its model."""
    held, first = _rows_held.get()(weight)
    total, end = weight.shape[0], first + held.shape[0]
    if end == first:
        return
    for block in range(first // DRAWN_ROWS, -(-end // DRAWN_ROWS)):
        start, stop = block * DRAWN_ROWS, min(total, (block + 1) * DRAWN_ROWS)
        drawn = torch.empty((stop - start, *weight.shape[1:]), dtype=held.dtype, device="cpu")
        fill(drawn, named_generator(f"{name}/{block}" if block else name, seed))
        low, high = max(start, first), min(stop, end)
        held[low - first : high - first].copy_(drawn[low - start : high - start])


def named_generator(name: str, seed: int) -> torch.Generator:
    """A generator seeded by a parameter's name and the run's seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fan_in_sigma(width: int, depth: int = 0) -> float:
    """Table 6: 1 / sqrt(2 width (depth + 1)), depth counted from 0."""
    return 1.0 / math.sqrt(2 * width * (depth + 1))

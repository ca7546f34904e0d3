"""Layers that the architectures share: projections, norms, persistent memory, initialization."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcore.kernels.rms_norm import rms_norm
from mmcore.kernels.swiglu import swiglu
from mmcore.kernels.thin_linear import thin_linear


class Linear(nn.Linear):
    """A projection without bias: [..., in] -> [..., out].

    Without gradients on a CPU, few rows take the bandwidth-bound kernel, and bf16 weights (half the bytes of a
    decoding step) meet fp32 activations.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and not torch.is_grad_enabled():
            return thin_linear(x, self.weight)
        return F.linear(x, self.weight)

    def reset_parameters(self) -> None:
        """Left unset: `init_weights` draws every parameter, also after a build on the meta device."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in fp32: [..., d] -> [..., d]."""

    def __init__(self, width: int, eps: float, kernels: str = "auto") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, implementation=self.kernels)


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
        return self.down_proj(swiglu(self.gate_proj(y), self.up_proj(y), implementation=self.kernels))

    @torch.no_grad()
    def init_weights(self, name: str, depth: int, seed: int) -> None:
        """Table 6; W_2 counts d', the width of what it reads."""
        for part, linear in self.named_children():
            draw_normal(f"{name}.{part}", linear.weight, fan_in_sigma(linear.in_features, depth), seed)


def draw_normal(name: str, weight: Tensor, sigma: float, seed: int) -> None:
    """Fill `weight` from a normal of deviation `sigma`, cut off at 3 sigma.

    The draw depends on the seed and the parameter's name alone, not on the order of drawing.
    """
    nn.init.trunc_normal_(weight, std=sigma, a=-3 * sigma, b=3 * sigma, generator=named_generator(name, seed, weight))


def named_generator(name: str, seed: int, like: Tensor) -> torch.Generator:
    """A generator on `like`'s device, seeded by the parameter's name and the run's seed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device=like.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fan_in_sigma(width: int, depth: int = 0) -> float:
    """Table 6: 1 / sqrt(2 width (depth + 1)), depth counted from 0."""
    return 1.0 / math.sqrt(2 * width * (depth + 1))

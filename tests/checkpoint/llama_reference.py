"""llama2.c's forward pass in float64 numpy, from the .bin file alone: the independent truth for conversions.

Loops over positions, heads and pairs as llama2.c does: interleaved rotary positions, grouped key-value heads,
SwiGLU. It shares no code with the project.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np


class ReferenceLlama:
    """A llama2.c version-0 file, its weights as float64."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        dim, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack_from("<7i", data)
        self.heads, self.kv_heads, self.size, self.layers = heads, kv_heads, dim // heads, layers
        values = np.frombuffer(data, dtype="<f4", offset=28).astype(np.float64)
        self._values, self._position = values, 0
        kv = kv_heads * self.size
        self.embedding = self._take(abs(vocabulary), dim)
        self.attention_norm = self._take(layers, dim)
        self.wq, self.wk = self._take(layers, dim, dim), self._take(layers, kv, dim)
        self.wv, self.wo = self._take(layers, kv, dim), self._take(layers, dim, dim)
        self.ffn_norm = self._take(layers, dim)
        self.w1, self.w2, self.w3 = (
            self._take(layers, hidden, dim), self._take(layers, dim, hidden), self._take(layers, hidden, dim)
        )  # fmt: skip
        self.norm = self._take(dim)
        self._take(length, self.size)  # the rotary tables, computed here instead
        self.classifier = self.embedding if vocabulary > 0 else self._take(abs(vocabulary), dim)
        assert self._position == len(values)

    def _take(self, *shape: int) -> np.ndarray:
        count = math.prod(shape)
        self._position += count
        return self._values[self._position - count : self._position].reshape(shape)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[T, V] for a list of T ids."""
        x = self.embedding[tokens]
        for layer in range(self.layers):
            x = x + self._attention(_rms(x, self.attention_norm[layer]), layer)
            y = _rms(x, self.ffn_norm[layer])
            gate, up = y @ self.w1[layer].T, y @ self.w3[layer].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w2[layer].T
        return _rms(x, self.norm) @ self.classifier.T

    def _attention(self, y: np.ndarray, layer: int) -> np.ndarray:
        T, D = len(y), self.size
        q = _rotate((y @ self.wq[layer].T).reshape(T, self.heads, D))
        k = _rotate((y @ self.wk[layer].T).reshape(T, self.kv_heads, D))
        v = (y @ self.wv[layer].T).reshape(T, self.kv_heads, D)
        out = np.zeros((T, self.heads, D))
        for t in range(T):
            for h in range(self.heads):
                g = h // (self.heads // self.kv_heads)
                scores = k[: t + 1, g] @ q[t, h] / math.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[t, h] = weights / weights.sum() @ v[: t + 1, g]
        return out.reshape(T, -1) @ self.wo[layer].T


def _rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def _rotate(x: np.ndarray) -> np.ndarray:
    T, _, D = x.shape
    out = np.empty_like(x)
    for t in range(T):
        for i in range(0, D, 2):
            angle = t / 10000.0 ** (i / D)
            c, s = math.cos(angle), math.sin(angle)
            out[t, :, i] = x[t, :, i] * c - x[t, :, i + 1] * s
            out[t, :, i + 1] = x[t, :, i] * s + x[t, :, i + 1] * c
    return out


def write_llama2c(path: Path, dim: int, hidden: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
                  length: int, tied: bool, seed: int = 0) -> None:  # fmt: skip
    """A random model in llama2.c's format."""
    kv, generator = kv_heads * dim // heads, np.random.default_rng(seed)
    count = 2 * vocabulary * dim if not tied else vocabulary * dim
    count += layers * (2 * dim + 2 * dim * dim + 2 * kv * dim + 3 * hidden * dim) + dim + length * dim // heads
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocabulary if tied else -vocabulary, length)
    path.write_bytes(header + generator.normal(0, 0.3, count).astype("<f4").tobytes())

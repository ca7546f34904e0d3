"""The baselines: Llama, and the transformer with separate long-term and short-term attention (figure 5).

Attention is a memory read with a fixed bandwidth 1/sqrt(D) whose newest pair is the query's own (delay 0), so
both run through the same kernel as the mosaics. Parameter names of the Llama are Hugging Face's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmcore.config import ModelConfig
from mmcore.config.rotary import rope_type
from mmcore.kernels.memory_read import memory_read
from mmcore.model.documents import Packing
from mmcore.model.language_model import LanguageModel
from mmcore.model.layers import Linear, PersistentMemory, RMSNorm, advanced, draw_normal, fan_in_sigma, project
from mmcore.model.mosaic import TwoMemoryBlock
from mmcore.model.state import AttentionState, DecodingState


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angles per position, [D/2] fp32: theta^(-2i/D), scaled as config.rope_scaling says (linear or llama3)."""
    D = config.head_size
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    scaling = config.rope_scaling or {}
    kind = rope_type(scaling)
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]
    return frequencies


def rotate(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary position encoding, halves convention: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x_BTHD.chunk(2, dim=-1)
    cos, sin = cos_TD[:, None, :].to(x_BTHD.dtype), sin_TD[:, None, :].to(x_BTHD.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Softmax attention with rotary positions and grouped key-value heads: [B, T, d] -> [B, T, heads * D].

    `window` and `delay` limit it as they limit a memory; delay 0 is ordinary causal attention.
    """

    def __init__(self, config: ModelConfig, window: int | None, kernels: str, output: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.kv_heads, config.head_size
        self.config, self.window, self.kernels = config, window, kernels
        self.q_proj = Linear(config.hidden_size, self.heads * self.size)
        self.k_proj = Linear(config.hidden_size, self.kv_heads * self.size)
        self.v_proj = Linear(config.hidden_size, self.kv_heads * self.size)
        if output:
            self.o_proj = Linear(self.heads * self.size, config.hidden_size)

    def projections(self) -> list[nn.Module]:
        """What `projected` holds the results of, in its order."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, y_BTd: Tensor, packing: Packing, delay: int, projected: list[Tensor] | None = None) -> Tensor:
        """`projected`: y through `projections()`, where others that read y have had theirs made along with them."""
        queries, keys, values = self._arrange(y_BTd, 0, projected)
        return self._read(queries, keys, values, packing.starts, delay, 0)

    def advance(
        self, y_BTd: Tensor, state: AttentionState, delay: int, wanted: int, projected: list[Tensor] | None = None
    ) -> Tensor:
        """The next T tokens, as far as the last `wanted` of them read: [B, T, d] -> [B, wanted, d]."""
        queries, keys, values = self._arrange(y_BTd, state.owner.length, projected)
        state.append(keys, values)
        offset = state.query_offset() + y_BTd.shape[1] - wanted
        return self._read(queries[:, -wanted:], *state.pairs(), state.starts(wanted), delay, offset)

    def _arrange(
        self, y_BTd: Tensor, position: int, projected: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys turned by their positions, and values, [B, T, heads, D] each."""
        T = y_BTd.shape[1]
        times = torch.arange(position, position + T, device=y_BTd.device, dtype=torch.float32)
        angles = times[:, None] * rotary_frequencies(self.config).to(y_BTd.device)
        cos, sin = angles.cos(), angles.sin()
        parts = projected or project(y_BTd, *self.projections())
        queries, keys, values = (part.unflatten(-1, (-1, self.size)) for part in parts)
        return rotate(queries, cos, sin), rotate(keys, cos, sin), values

    def _read(self, queries, keys, values, starts, delay, offset) -> Tensor:
        if self.kv_heads != self.heads:
            keys, values = (x.repeat_interleave(self.heads // self.kv_heads, dim=2) for x in (keys, values))
        fixed = torch.full((self.heads,), 1 / math.sqrt(self.size), device=queries.device)
        read = memory_read(
            queries, keys, values, fixed, torch.zeros_like(fixed), torch.zeros_like(fixed), starts=starts,
            window=self.window, delay=delay, offset=offset, implementation=self.kernels,
        )
        read = read.flatten(2)
        return self.o_proj(read) if hasattr(self, "o_proj") else read

    @torch.no_grad()
    def init_weights(self, name: str, depth: int, seed: int) -> None:
        for part, linear in self.named_children():
            draw_normal(f"{name}.{part}", linear.weight, fan_in_sigma(linear.in_features, depth), seed)


class LlamaBlock(nn.Module):
    """One layer of a Llama: [B, T, d] -> [B, T, d]. Attention counts as its memory of the context."""

    MEMORIES = ("attention", "persistent")
    READS = ("attention",)

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__()
        d = config.hidden_size
        self.input_layernorm = RMSNorm(d, config.rms_norm_eps, kernels)
        self.self_attn = Attention(config, None, kernels, output=True)
        self.post_attention_layernorm = RMSNorm(d, config.rms_norm_eps, kernels)
        self.mlp = PersistentMemory(d, config.intermediate_size, kernels)

    def forward(self, x_BTd: Tensor, packing: Packing, delay: int, without: frozenset[str] = frozenset()) -> Tensor:
        if "attention" not in without:
            x_BTd = x_BTd + self.self_attn(self.input_layernorm(x_BTd), packing, 0)
        return self._finish(x_BTd, without)

    def advance(
        self, x_BTd: Tensor, states: dict[str, AttentionState], delay: int, without: frozenset[str], wanted: int
    ) -> Tensor:
        x = x_BTd[:, -wanted:]
        if "attention" not in without:
            x = x + advanced(self.self_attn, self.input_layernorm(x_BTd), states["attention"], 0, wanted)
        return self._finish(x, without)

    def _finish(self, x_BTd: Tensor, without: frozenset[str]) -> Tensor:
        if "persistent" in without:
            return x_BTd
        return x_BTd + self.mlp(self.post_attention_layernorm(x_BTd))

    def new_states(self, owner: DecodingState) -> dict[str, AttentionState]:
        return {"attention": AttentionState(owner, None)}

    @torch.no_grad()
    def init_weights(self, name: str, depth: int, seed: int) -> None:
        self.self_attn.init_weights(f"{name}.self_attn", depth, seed)
        self.mlp.init_weights(f"{name}.mlp", depth, seed)


class LongShortBlock(TwoMemoryBlock):
    """A mosaic block whose two contextual memories are attention (figure 5)."""

    SHORT_DELAY = 0
    STATE = AttentionState

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        short_term = Attention(config, config.short_term_window, kernels, output=False)
        super().__init__(config, short_term, Attention(config, None, kernels, output=False), kernels)


def build_transformer(config: ModelConfig, kernels: str = "auto") -> LanguageModel:
    """A Llama, or its long-short-attention variant, with unset weights."""
    block = LongShortBlock if config.model_type == "long_short_transformer" else LlamaBlock
    return LanguageModel(config, (block(config, kernels) for _ in range(config.num_hidden_layers)), kernels)

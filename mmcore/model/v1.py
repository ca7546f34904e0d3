"""The first Memory Mosaic (v1): Zhang et al., "Memory Mosaics", arXiv 2405.06394; for the checkpoints that users hold.

For each of H heads of size D = d / H, with y the norm of the residual stream x and theta trained scalars of the head:

    key         k_t = kbar_t / ||kbar_t||,                  kbar_t = W_phi y_t + exp(-10 |theta_lam|) kbar_{t-1}
    value       v_t = exp(10 theta_v) vbar_t / ||vbar_t||,  vbar_t = gamma v~_t + (1 - gamma) v~_{t+1},  v~ = W_psi y
    contextual  sum_i softmax_i(beta k_t . k_i) v_i over the pairs 1 .. t-1
    persistent  exp(10 theta_v) sum_i softmax_i(beta k_t . K_i) V_i over N trained pairs, with keys k of its own
    bandwidth   beta = exp(min(20 theta_beta, limit))

Each memory writes W_o [heads] into the residual stream; norms are LayerNorms; the classifier is the embedding, and the
`library` variant divides its logits by sqrt(d). The factors of ten are the authors': they let scalars learn faster.
Other settings of the public code (V1Config) are generalizations: keys and values computed from several tokens, values
that look another number of tokens ahead (the pair of t then exists from t + shift on), several sets of trained pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcore.config import ModelConfig
from mmcore.kernels.gated_scan import gated_scan
from mmcore.kernels.memory_read import memory_read
from mmcore.model.documents import Packing
from mmcore.model.language_model import LanguageModel
from mmcore.model.layers import LayerNorm, Linear, draw_normal, draw_uniform
from mmcore.model.state import DecodingState
from mmcore.model.v1_state import LeakyState, PairState

SCALE = 10.0
"""What the scalars of a head are multiplied with before they are used."""

_LARGEST_FP16 = math.log(2**16 - 1)
LIMITS = {
    "nano": {"contextual": 2 * _LARGEST_FP16, "persistent": _LARGEST_FP16},
    "library": {"contextual": 10.0, "persistent": 10.0},
}
"""Variant -> memory -> largest log beta. nano bounds the scale of a key, which a contextual score meets twice."""


class Projection(Linear):
    """W y_t + b; with several taps sum_j W_j y_{t - taps + 1 + j} + b, where tokens before the document are zero."""

    def __init__(self, width: int, bias: bool, taps: int = 1) -> None:
        super().__init__(width, width)
        if taps > 1:
            self.weight = nn.Parameter(torch.empty(width, width, taps))
        if bias:
            self.bias = nn.Parameter(torch.empty(width))
        self.taps = taps

    def forward(self, y_BTd: Tensor, past_BRd: Tensor | None = None, starts_BT: Tensor | None = None) -> Tensor:
        """[B, T, d] -> [B, T, d]. past: at least taps - 1 inputs from before y; None: zeros. starts int32 [B, T]: the
        index in the row of the first token of each token's document; None: every row is one, or y and past hold zeros
        where it has not begun."""
        if self.taps == 1:
            return super().forward(y_BTd)
        out = self._convolve(y_BTd, past_BRd, starts_BT)
        return out if self.bias is None else out + self.bias

    def quantize(self) -> None:
        """As Linear; the weights of several taps stay as they are."""
        if self.taps == 1:
            super().quantize()

    def _convolve(self, y_BTd: Tensor, past_BRd: Tensor | None, starts_BT: Tensor | None) -> Tensor:
        (B, T, d), reach = y_BTd.shape, self.taps - 1
        before = y_BTd.new_zeros(B, reach, d) if past_BRd is None else past_BRd[:, past_BRd.shape[1] - reach :]
        joined = torch.cat([before, y_BTd], dim=1)
        times = torch.arange(T, device=y_BTd.device)
        out = torch.zeros_like(y_BTd)
        for tap in range(self.taps):
            x = joined[:, tap : tap + T]
            if starts_BT is not None:
                x = x * (times - (reach - tap) >= starts_BT)[..., None]
            out = out + F.linear(x, self.weight[..., tap].to(x.dtype))
        return out


class LeakyMemory(nn.Module):
    """What both memories of a layer have: keys from a leaky average, a bandwidth, a scale of values, and W_o."""

    KIND: str

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__()
        d, H, v1 = config.hidden_size, config.num_attention_heads, config.v1
        self.heads = H
        self.kernels = kernels
        self.limit = LIMITS[v1.variant][self.KIND]
        self.key_proj = Projection(d, v1.bias, v1.key_taps)
        self.key_decay = nn.Parameter(torch.empty(H))
        self.bandwidth = nn.Parameter(torch.empty(H))
        self.value_log_scale = nn.Parameter(torch.empty(H))
        self.out_proj = Projection(d, v1.bias)

    def keys(
        self, y_BTd: Tensor, packing: Packing, past_BRd: Tensor | None = None, scan: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Unit-norm keys [B, T, H, D], and the recurrence's state after the last token."""
        raw_BTHD = self.split_heads(self.key_proj(y_BTd, past_BRd, packing.starts))
        decays_BTH = (-SCALE * _exact(self.key_decay).abs()).expand(raw_BTHD.shape[:3])
        return gated_scan(
            raw_BTHD, torch.zeros_like(decays_BTH), decays_BTH, resets=packing.resets, state=scan,
            implementation=self.kernels,
        )

    def read(self, queries_BTHD: Tensor, keys_BTHD: Tensor, values_BTHD: Tensor, **where) -> Tensor:
        """Kernel regression with this memory's bandwidth."""
        beta = (2 * SCALE * _exact(self.bandwidth)).clamp(max=self.limit).exp()
        nothing = torch.zeros_like(beta)
        return memory_read(
            queries_BTHD, keys_BTHD, values_BTHD, beta, nothing, nothing, implementation=self.kernels, **where
        )

    def value_scale(self) -> Tensor:
        """[H, 1], fp32 or better."""
        return (SCALE * _exact(self.value_log_scale)).exp()[:, None]

    def split_heads(self, x_BTd: Tensor) -> Tensor:
        return x_BTd.unflatten(-1, (self.heads, -1))

    def nothing(self, x_BTd: Tensor) -> Tensor:
        """What an empty memory writes: W_o of zeros, which leaves its bias."""
        return self.out_proj(torch.zeros_like(x_BTd))


class ContextualMemory(LeakyMemory):
    """Pairs of the context."""

    KIND = "contextual"

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__(config, kernels)
        v1 = config.v1
        self.shift = v1.value_shift
        self.mixes = v1.value_taps is None
        self.value_proj = Projection(config.hidden_size, v1.bias, v1.value_taps or 1)
        if self.mixes:
            self.value_mix = nn.Parameter(torch.empty(self.heads))

    def forward(self, y_BTd: Tensor, packing: Packing) -> Tensor:
        """What whole sequences read and write: [B, T, d] -> [B, T, d]."""
        keys, _ = self.keys(y_BTd, packing)
        values, _ = self.values(y_BTd, packing)
        count = max(0, y_BTd.shape[1] - self.shift)
        read = self.read(
            keys, keys[:, :count], values[:, values.shape[1] - count :], starts=packing.starts, delay=self.shift
        )
        return self.out_proj(read.flatten(2))

    def advance(self, y_BTd: Tensor, state: PairState) -> Tensor:
        """The same for the next T tokens of a conversation, whose past lies in `state`."""
        T = y_BTd.shape[1]
        y_BTd, packing, past = state.enter(y_BTd)
        keys, state.scan = self.keys(y_BTd, packing, past, state.scan)
        values, raw = self.values(y_BTd, packing, past, state.pending_raw)
        state.append(keys, values, raw if self.mixes else None)
        read = self.read(
            keys, *state.pairs(), starts=state.starts(T), delay=self.shift, offset=state.query_offset()
        )
        return self.out_proj(read.flatten(2))

    def values(
        self, y_BTd: Tensor, packing: Packing, past_BRd: Tensor | None = None, pending_BSHD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The values that the tokens complete: at t that of the pair of t - shift, [B, T, H, D]; and v~ of the tokens.

        `pending` is v~ of the last `shift` tokens before these. Values of pairs before the first token mean nothing.
        """
        raw = self.split_heads(self.value_proj(y_BTd, past_BRd, packing.starts))
        mean = raw
        if self.mixes:
            before = raw.new_zeros(raw.shape[0], self.shift, *raw.shape[2:]) if pending_BSHD is None else pending_BSHD
            own, gamma = torch.cat([before, raw], dim=1)[:, : raw.shape[1]], self.value_mix[:, None].to(raw.dtype)
            mean = gamma * own + (1 - gamma) * raw
        return (F.normalize(_exact(mean), dim=-1) * self.value_scale()).to(raw.dtype), raw


class PersistentMemory(LeakyMemory):
    """Pairs fixed by training: banks of N for each head. Only its key recurrence goes on while decoding."""

    KIND = "persistent"

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__(config, kernels)
        shape = (config.v1.persistent_banks, self.heads, config.intermediate_size, config.head_size)
        self.slot_keys = nn.Parameter(torch.empty(shape))
        self.slot_values = nn.Parameter(torch.empty(shape))

    def forward(self, y_BTd: Tensor, packing: Packing) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        return self._recall(self.keys(y_BTd, packing)[0])

    def advance(self, y_BTd: Tensor, state: LeakyState, wanted: int) -> Tensor:
        """The next T tokens, as far as the last `wanted` of them are asked for: [B, T, d] -> [B, wanted, d]."""
        y_BTd, packing, past = state.enter(y_BTd)
        keys, state.scan = self.keys(y_BTd, packing, past, state.scan)
        return self._recall(keys[:, -wanted:])

    def _recall(self, keys_BTHD: Tensor) -> Tensor:
        """The mean of the banks' reads. The pairs are the same for all tokens, so the batch is read as one row."""
        rows, N = keys_BTHD.flatten(0, 1)[None], self.slot_keys.shape[2]
        found = [
            self.read(rows, keys_HND.transpose(0, 1)[None], values_HND.transpose(0, 1)[None], delay=0, offset=N)
            for keys_HND, values_HND in zip(self.slot_keys.to(rows.dtype), self.slot_values.to(rows.dtype), strict=True)
        ]
        mean = torch.stack(found).mean(dim=0) if len(found) > 1 else found[0]
        read = (_exact(mean) * self.value_scale()).to(rows.dtype)
        return self.out_proj(read.view(keys_BTHD.shape).flatten(2))


class V1Block(nn.Module):
    """A layer of a v1 mosaic: [B, T, d] -> [B, T, d]. `delay` is that of v2's long-term memories, and not used."""

    MEMORIES = ("contextual", "persistent")

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__()
        v1 = config.v1
        self.norm_first = v1.norm_first
        self.READS = self.MEMORIES if v1.persistent_banks else self.MEMORIES[:1]
        self.memory_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, v1.bias)
        self.contextual = ContextualMemory(config, kernels)
        if v1.persistent_banks:
            self.persistent_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, v1.bias)
            self.persistent = PersistentMemory(config, kernels)
        self.reach = max(v1.key_taps, v1.value_taps or 1) - 1
        self.key_reach = v1.key_taps - 1

    def forward(self, x_BTd: Tensor, packing: Packing, delay: int, without: frozenset[str] = frozenset()) -> Tensor:
        def run(name: str, y_BTd: Tensor) -> Tensor:
            return getattr(self, name)(y_BTd, packing)

        return self._pass(x_BTd, run, without, x_BTd.shape[1])

    def advance(
        self, x_BTd: Tensor, states: dict[str, PairState | LeakyState], delay: int, without: frozenset[str], wanted: int
    ) -> Tensor:
        """The next T tokens, as far as the last `wanted` of them are asked for: [B, T, d] -> [B, wanted, d].

        The persistent memory's keys average over all tokens, so only its reads can be spared.
        """
        def run(name: str, y_BTd: Tensor) -> Tensor:
            if name == "contextual":
                return self.contextual.advance(y_BTd, states[name])
            return self.persistent.advance(y_BTd, states[name], wanted)

        return self._pass(x_BTd, run, without, wanted)

    def _pass(self, x: Tensor, run: Callable[[str, Tensor], Tensor], without: frozenset[str], wanted: int) -> Tensor:
        for name, norm in zip(self.READS, ("memory_norm", "persistent_norm"), strict=False):
            y = getattr(self, norm)(x)
            added = getattr(self, name).nothing(y) if name in without else run(name, y)
            base = x if self.norm_first else y
            x = base[:, -added.shape[1] :] + added
        return x[:, -wanted:]

    def new_states(self, owner: DecodingState) -> dict[str, PairState | LeakyState]:
        states = {"contextual": PairState(owner, self.reach, self.contextual.shift)}
        if "persistent" in self.READS:
            states["persistent"] = LeakyState(owner, self.key_reach)
        return states


class V1LanguageModel(LanguageModel):
    """Tokens -> logits. Knocked-out memories, `contextual` and `persistent`, read as empty."""

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        d, v1 = config.hidden_size, config.v1
        # Scaling what the classifier reads scales its logits.
        scale = 1 / math.sqrt(d) if v1.variant == "library" else 1.0
        norm = LayerNorm(d, config.rms_norm_eps, v1.bias, scale)
        layers = (V1Block(config, kernels) for _ in range(config.num_hidden_layers))
        super().__init__(config, layers, kernels, norm)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Draw every parameter as the public code's variant does, by name and seed (see LanguageModel)."""
        config = self.config
        d, depth, nano = config.hidden_size, config.num_hidden_layers, config.v1.variant == "nano"
        for name, parameter in self.named_parameters():
            leaf = name.rpartition(".")[2]
            if leaf in ("slot_keys", "slot_values"):
                draw_normal(name, parameter, 1 / math.sqrt(config.head_size), seed)
            elif leaf == "weight" and parameter.ndim > 1:
                taps = parameter.shape[2] if parameter.ndim == 3 else 1
                sigma = 0.02 if nano else 1 / math.sqrt(d * taps)
                if "out_proj" in name:
                    sigma /= math.sqrt(2 * depth if nano else depth)
                draw_normal(name, parameter, sigma, seed)
            elif leaf == "value_mix":
                draw_uniform(name, parameter, seed)
            elif leaf == "key_decay":
                parameter.copy_(torch.linspace(0.5, 5, len(parameter), device=parameter.device) / SCALE)
            else:
                parameter.fill_({"weight": 1.0, "bias": 0.0, "bandwidth": 1 / SCALE, "value_log_scale": -0.5 / SCALE}[leaf])


def build_v1(config: ModelConfig, kernels: str = "auto") -> LanguageModel:
    """A v1 mosaic with unset weights."""
    return V1LanguageModel(config, kernels)


def _exact(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

"""Contextual memories: gated keys (8), look-ahead values (9), adaptive bandwidth (6), retrieval (4), windows (10).

Equation numbers are those of Zhang and Bottou, "Memory Mosaics at scale", arXiv 2507.03285.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmcore.config import ModelConfig
from mmcore.kernels.gated_scan import gated_scan
from mmcore.kernels.look_ahead import look_ahead
from mmcore.kernels.memory_read import memory_read
from mmcore.kernels.mosaic_step import MemoryWeights
from mmcore.kernels.recompute import cheap
from mmcore.model.documents import Packing
from mmcore.model.layers import Linear, draw_normal, draw_uniform, fan_in_sigma, project
from mmcore.model.state import MemoryState

_values = cheap(look_ahead)

LARGEST_LOG_SCALE, LARGEST_LOG_BANDWIDTH = 15, 10
"""What exponents of a memory's parameters are cut off at."""


class ContextualMemory(nn.Module):
    """H associative memories of head size D, each filled with (key, value) pairs of the context and read by kernel
    regression: f(k_t) = sum_i softmax_i(beta k_t . k_i) v_i.

    Which pairs a query at t reads is set by two numbers (10): `delay`, the newest pair is t - delay, and `window`,
    the oldest is t - window + 1 (None: the first of the document).
    """

    def __init__(self, config: ModelConfig, window: int | None, kernels: str = "auto") -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.heads = heads
        self.gated_keys = config.gated_keys
        self.window = window
        self.kernels = kernels
        self.key_proj = Linear(width, width)  # W_phi
        self.value_proj = Linear(width, width)  # W_psi
        if config.gated_keys:
            self.gate_proj = Linear(width, heads)  # W_g
            self.decay_proj = Linear(width, heads)  # W_lambda
        else:
            self.key_decay = nn.Parameter(torch.empty(heads))  # lam = exp(-|theta|) at every token
        self.value_mix = nn.Parameter(torch.empty(heads))  # gamma
        self.value_log_scale = nn.Parameter(torch.empty(heads))
        self.bandwidth_base = nn.Parameter(torch.empty(heads))
        self.bandwidth_slope = nn.Parameter(torch.empty(heads))
        self.bandwidth_exponent = nn.Parameter(torch.empty(heads), requires_grad=config.adaptive_bandwidth)

    def projections(self) -> list[nn.Module]:
        """What `projected` holds the results of, in its order."""
        gates = [self.gate_proj, self.decay_proj] if self.gated_keys else []
        return [self.key_proj, *gates, self.value_proj]

    def forward(self, y_BTd: Tensor, packing: Packing, delay: int, projected: list[Tensor] | None = None) -> Tensor:
        """What each position of whole sequences reads: [B, T, d] -> [B, T, d]. `projected`: y through `projections()`,
        where others that read y have had theirs made along with them."""
        *parts, raw_values = self._arrange(y_BTd, projected)
        keys, _ = self._scan(*parts, packing.resets)
        scale, *bandwidth = self._scale_and_bandwidth()
        values = _values(raw_values, self.value_mix, scale, implementation=self.kernels)
        read = memory_read(
            keys, keys, values, *bandwidth, starts=packing.starts, window=self.window, delay=delay,
            implementation=self.kernels,
        )
        return read.flatten(2)

    def advance(
        self, y_BTd: Tensor, state: MemoryState, delay: int, wanted: int, projected: list[Tensor] | None = None
    ) -> Tensor:
        """The same for the next T tokens of a conversation, whose past lies in `state`, as far as the last `wanted` of
        them read: [B, T, d] -> [B, wanted, d].

        The pair of the last token waits in the state for the token that completes it.
        """
        *parts, raw_values = self._arrange(y_BTd, projected)
        keys, state.scan = self._scan(*parts, state.resets(y_BTd.shape[1]), state.scan)
        state.append(keys, raw_values, self._completed)
        stored_keys, stored_values = state.pairs()
        read = memory_read(
            keys[:, -wanted:], stored_keys, stored_values, *self.bandwidth(), starts=state.starts(wanted),
            window=self.window, delay=delay, offset=state.query_offset() + y_BTd.shape[1] - wanted,
            implementation=self.kernels,
        )
        return read.flatten(2)

    def keys(self, y_BTd: Tensor, resets_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Equation (8) of whole sequences: keys [B, T, H, D], and the log g_t and log lam_t that made them, [B, T, H]."""
        raw_keys, log_gates, log_decays, _ = self._arrange(y_BTd)
        return self._scan(raw_keys, log_gates, log_decays, resets_BT)[0], log_gates, log_decays

    def _arrange(self, y_BTd: Tensor, projected: list[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k~ [B, T, H, D], log g = W_g x and log lam = -|W_lambda x| [B, T, H], and v~ [B, T, H, D]. Without gated keys
        log g is 0 and log lam one number a head."""
        keys, *gates_and_decays, values = projected or project(y_BTd, *self.projections())
        if not self.gated_keys:
            decays = (-self.key_decay.abs()).to(keys.dtype).expand(*keys.shape[:-1], -1)
            return self._heads(keys), torch.zeros_like(decays), decays, self._heads(values)
        gates, decays = gates_and_decays
        return self._heads(keys), gates, -decays.abs(), self._heads(values)

    def _scan(self, raw_keys, log_gates, log_decays, resets_BT, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Equation (8): unit-norm keys [B, T, H, D] of the gated recurrence, and its state after the last token."""
        return gated_scan(
            raw_keys, log_gates, log_decays, resets=resets_BT, state=state, implementation=self.kernels
        )

    def _completed(self, raw_BTHD: Tensor, following_BHD: Tensor) -> Tensor:
        """Equation (9) for pairs whose next value is known."""
        return look_ahead(
            raw_BTHD, self.value_mix, self.value_scale(), following=following_BHD, implementation=self.kernels
        )

    def value_scale(self) -> Tensor:
        """alpha_psi [H] = exp(min(theta, 15)). The paper prints |theta|, whose gradient at its own start, 0, is 0 in
        PyTorch: such a parameter would never move."""
        return _exact(self.value_log_scale).clamp(max=LARGEST_LOG_SCALE).exp()

    def bandwidth(self) -> tuple[Tensor, Tensor, Tensor]:
        """beta_0, beta_1 and alpha of equation (6), beta = beta_1 n^alpha + beta_0, each [H], fp32 or better."""
        return (
            _exact(self.bandwidth_base).clamp(max=LARGEST_LOG_BANDWIDTH).exp(),
            _exact(self.bandwidth_slope).clamp(max=LARGEST_LOG_BANDWIDTH).exp(),
            _exact(self.bandwidth_exponent).abs().clamp(max=1),
        )

    def _scale_and_bandwidth(self) -> tuple[Tensor, ...]:
        """Both. A compiled layer makes all four, and their gradients, in one kernel each where there were four; calls one by
        one are quicker apart: 8 small operations for 13."""
        if not torch.compiler.is_compiling():
            return self.value_scale(), *self.bandwidth()
        own = (self.value_log_scale, self.bandwidth_base, self.bandwidth_slope, self.bandwidth_exponent)
        raw = torch.stack([_exact(parameter) for parameter in own])
        row = torch.arange(4, device=raw.device)[:, None]
        limit = torch.where(row == 0, LARGEST_LOG_SCALE, LARGEST_LOG_BANDWIDTH)
        positive = torch.where(raw > limit, limit, raw).exp()
        return torch.where(row < 3, positive, raw.abs().clamp(max=1)).unbind()

    def step_weights(self, delay: int) -> MemoryWeights:
        """This memory's weights as the compiled step takes them."""
        matrices = (proj.matrix() for proj in (self.key_proj, self.value_proj, self.gate_proj, self.decay_proj))
        return MemoryWeights(*matrices, self.value_mix, *self._scale_and_bandwidth(), self.window, delay)

    def _heads(self, x_BTd: Tensor) -> Tensor:
        return x_BTd.unflatten(-1, (self.heads, -1))

    @torch.no_grad()
    def init_weights(self, name: str, depth: int, seed: int) -> None:
        """Table 6."""
        for part, linear in self.named_children():
            draw_normal(f"{name}.{part}", linear.weight, fan_in_sigma(linear.in_features, depth), seed)
        if not self.gated_keys:
            draw_uniform(f"{name}.key_decay", self.key_decay, seed)
        draw_uniform(f"{name}.value_mix", self.value_mix, seed)
        self.value_log_scale.zero_()
        self.bandwidth_base.fill_(1.5)
        self.bandwidth_slope.fill_(1.5)
        self.bandwidth_exponent.fill_(1 / 3 if self.bandwidth_exponent.requires_grad else 0)


def _exact(parameter: Tensor) -> Tensor:
    """The parameter in fp32 at least: exp in bf16 is off by a percent."""
    return parameter if parameter.dtype is torch.float64 else parameter.float()

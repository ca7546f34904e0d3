"""The Memory Mosaic: blocks of contextual and persistent memories (figure 2, equation 10).

    x <- x + W_o [ short-term heads | long-term heads ](RMSNorm(x))
    x <- x + W_2( SiLU(W_1 y) * W_3 y ),  y = RMSNorm(x)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmcore.config import ModelConfig
from mmcore.kernels import mosaic_step
from mmcore.kernels.mosaic_step import LayerWeights
from mmcore.kernels.recompute import cheap
from mmcore.model.documents import Packing
from mmcore.model.language_model import LanguageModel
from mmcore.model.layers import (
    Linear,
    PersistentMemory,
    RMSNorm,
    advanced,
    draw_normal,
    fan_in_sigma,
    hooked,
    is_plain,
    project,
)  # fmt: skip
from mmcore.model.memories import ContextualMemory
from mmcore.model.state import AttentionState, DecodingState, MemoryState

LARGEST_IN_FP16 = 10_000
"""Norm of values up to which decoding may keep them in fp16, whose numbers end at 65,504."""


@cheap
def _side_by_side(short_BTd: Tensor, long_BTd: Tensor) -> Tensor:
    return torch.cat([short_BTd, long_BTd], dim=-1)


class TwoMemoryBlock(nn.Module):
    """A layer whose `short_term` and `long_term` heads write through one W_o, [d, 2d]: [B, T, d] -> [B, T, d].

    The memories are given by the subclass, with SHORT_DELAY, the distance from a query to the newest short-term pair
    it reads, and STATE, what they keep while decoding.
    """

    MEMORIES = ("short_term", "long_term", "persistent")
    READS = ("short_term", "long_term")
    SHORT_DELAY: int
    STATE: type[AttentionState]

    def __init__(self, config: ModelConfig, short_term: nn.Module, long_term: nn.Module, kernels: str = "auto") -> None:
        super().__init__()
        d = config.hidden_size
        self.memory_norm = RMSNorm(d, config.rms_norm_eps, kernels)
        self.short_term = short_term
        self.long_term = long_term
        self.out_proj = Linear(2 * d, d)
        self.persistent_norm = RMSNorm(d, config.rms_norm_eps, kernels)
        self.persistent = PersistentMemory(d, config.intermediate_size, kernels)

    def forward(self, x_BTd: Tensor, packing: Packing, delay: int, without: frozenset[str] = frozenset()) -> Tensor:
        y = self.memory_norm(x_BTd)
        projected = self._projected(y, without)

        def read(name: str, delay: int) -> Tensor:
            if name in without:
                return torch.zeros_like(y)
            return getattr(self, name)(y, packing, delay, projected=projected.pop(name, None))

        return self._finish(x_BTd, read("short_term", self.SHORT_DELAY), read("long_term", delay), without)

    def advance(
        self, x_BTd: Tensor, states: dict[str, AttentionState], delay: int, without: frozenset[str], wanted: int
    ) -> Tensor:
        """The next T tokens, as far as the last `wanted` of them are asked for: [B, T, d] -> [B, wanted, d]."""
        y, x = self.memory_norm(x_BTd), x_BTd[:, -wanted:]
        projected = self._projected(y, without)

        def read(name: str, delay: int) -> Tensor:
            if name in without:
                return torch.zeros_like(x)
            return advanced(getattr(self, name), y, states[name], delay, wanted, projected.pop(name, None))

        return self._finish(x, read("short_term", self.SHORT_DELAY), read("long_term", delay), without)

    def _projected(self, y_BTd: Tensor, without: frozenset[str]) -> dict[str, list[Tensor]]:
        """All projections of y as one call: gates and decays of both memories are one product on a GPU, and on a CPU y is
        read once and its gradient summed once. A memory whose hooks may change what it is given makes its own."""
        memories = {name: getattr(self, name) for name in self.READS if name not in without}
        parts = {name: memory.projections() for name, memory in memories.items() if not hooked(memory)}
        results = iter(project(y_BTd, *(layer for part in parts.values() for layer in part)) if parts else ())
        return {name: [next(results) for _ in part] for name, part in parts.items()}

    def _finish(self, x_BTd: Tensor, short_BTd: Tensor, long_BTd: Tensor, without: frozenset[str]) -> Tensor:
        x = x_BTd + self.out_proj(_side_by_side(short_BTd, long_BTd))
        return x if "persistent" in without else x + self.persistent(self.persistent_norm(x))

    def new_states(self, owner: DecodingState) -> dict[str, AttentionState]:
        return {name: self.STATE(owner, getattr(self, name).window) for name in self.READS}

    @torch.no_grad()
    def init_weights(self, name: str, depth: int, seed: int) -> None:
        """Table 6; W_o counts d, the width of one memory, and W_2 the width of what it reads, d'."""
        self.short_term.init_weights(f"{name}.short_term", depth, seed)
        self.long_term.init_weights(f"{name}.long_term", depth, seed)
        d = self.out_proj.out_features
        draw_normal(f"{name}.out_proj", self.out_proj.weight, fan_in_sigma(d, depth), seed)
        self.persistent.init_weights(f"{name}.persistent", depth, seed)


class MosaicBlock(TwoMemoryBlock):
    """One layer of a Memory Mosaic (10). A short-term query at t reads the pairs t-h+1 .. t-1, a long-term one 1 .. t-m."""

    SHORT_DELAY = 1
    STATE = MemoryState

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        short_term = ContextualMemory(config, config.short_term_window, kernels)
        super().__init__(config, short_term, ContextualMemory(config, None, kernels), kernels)

    def step_weights(self, delay: int) -> LayerWeights:
        """This layer's weights as the compiled step takes them."""
        persistent = self.persistent
        return LayerWeights(
            self.memory_norm.weight, self.short_term.step_weights(self.SHORT_DELAY), self.long_term.step_weights(delay),
            self.out_proj.matrix(), self.persistent_norm.weight, persistent.gate_proj.matrix(), persistent.up_proj.matrix(),
            persistent.down_proj.matrix(),
        )

    @staticmethod
    def pair_dtype(model: LanguageModel) -> torch.dtype | None:
        """What decoding keeps pairs in: fp16 on a CPU where weights are bf16 or int8 (after long prompts pairs are most of
        what a token reads), unless values are too large for it; None, as they are computed, elsewhere, and where what has
        taken the classifier's place has no weight."""
        weight = getattr(model.lm_head, "weight", None)
        if weight is None or not weight.is_cpu or weight.dtype not in (torch.bfloat16, torch.int8):
            return None
        memories = (memory for layer in model.model.layers for memory in (layer.short_term, layer.long_term))
        largest = torch.stack([memory.value_log_scale for memory in memories]).max().item()
        return torch.float16 if largest <= math.log(LARGEST_IN_FP16) else None

    @staticmethod
    def as_built(model: LanguageModel) -> bool:
        """Whether every part of the model does what it was built to do: the compiled step calls no module, so float8,
        adapters and hooks would be passed over."""
        return all(_as_built(module) for module in model.modules() if module is not model)

    @classmethod
    def whole_step(cls, model: LanguageModel) -> Callable | bool:
        """The compiled step of a whole mosaic, or False where it cannot run."""
        config = model.config
        if not config.gated_keys or not cls.as_built(model):
            return False
        layers = [layer.step_weights(config.long_term_delay) for layer in model.model.layers]
        classifier = model.lm_head.matrix()
        if mosaic_step.why_not(layers, classifier):
            return False
        return mosaic_step.mosaic_step(
            layers, model.model.norm.weight, classifier, config.num_attention_heads, config.rms_norm_eps,
            model.model.embed_tokens.weight,
        )


_FORWARDS = frozenset(
    kind.forward for kind in (nn.Module, nn.Embedding, MosaicBlock, ContextualMemory, PersistentMemory, RMSNorm)
)


def _as_built(module: nn.Module) -> bool:
    """Whether a part of a mosaic does what build_mosaic made it to do, with nothing hung on it or put in its place."""
    if isinstance(module, Linear):
        return is_plain(module)
    return type(module).forward in _FORWARDS and "forward" not in vars(module) and not hooked(module)


def build_mosaic(config: ModelConfig, kernels: str = "auto") -> LanguageModel:
    """A Memory Mosaic with unset weights."""
    layers = (MosaicBlock(config, kernels) for _ in range(config.num_hidden_layers))
    return LanguageModel(config, layers, kernels)

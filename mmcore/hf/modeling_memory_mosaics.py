"""Memory Mosaics v2 for transformers (Zhang and Bottou, "Memory Mosaics at scale", arXiv 2507.03285).

    x <- x + W_o [ short-term heads | long-term heads ](RMSNorm(x))      contextual memories
    x <- x + W_2( SiLU(W_1 y) * W_3 y ),  y = RMSNorm(x)                 persistent memory
    logits = W_c RMSNorm(x)

Plain PyTorch that needs transformers alone: a folder which ships this file, memories_memory_mosaics.py and
configuration_memory_mosaics.py can be used without any other package. The `mm` package computes the same with its own
kernels, and is the faster one for training and decoding.

Where there is padding (attention_mask 0, on any side), a row reads exactly as if the padded tokens were not there.
Equation numbers are the paper's. Shape suffixes: B rows, T tokens, d hidden, V vocabulary.
"""

import math
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_memory_mosaics import MemoryMosaicConfig
from .memories_memory_mosaics import MemoryMosaicCache, look_ahead_values, read_memory, unit_keys, wide_dtype

CACHE = "cache" if any(field.name == "cache" for field in fields(BaseModelOutputWithPast)) else "past_key_values"
"""What this version of transformers calls a cache: past_key_values up to 5.23. Forward passes take either name."""


class Place(NamedTuple):
    """Where the new tokens stand: time of the first, and, unless each row is one whole document, where theirs begin."""

    time: int = 0
    starts: torch.Tensor | None = None
    """int64 [B, T]: time at which the token's document begins."""
    resets: torch.Tensor | None = None
    """bool [B, T]: whether the token is the first of its document."""


def projection(inputs, outputs, depth=0):
    """A matrix without bias that starts normal with sigma = 1 / sqrt(2 inputs (depth + 1)), cut off at 3 sigma (table 6)."""
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.initial_sigma = 1 / math.sqrt(2 * inputs * (depth + 1))
    return linear


class MemoryMosaicRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in fp32."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        precise = x.to(wide_dtype(x))
        return (precise * torch.rsqrt(precise.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class MemoryMosaicMemory(nn.Module):
    """H associative memories, filled with the (key, value) pairs of the context and read by kernel regression."""

    def __init__(self, config, depth, window, delay):
        super().__init__()
        d, self.heads = config.hidden_size, config.num_attention_heads
        self.window, self.delay = window, delay
        self.key_proj = projection(d, d, depth)  # W_phi
        self.value_proj = projection(d, d, depth)  # W_psi
        self.gate_proj = projection(d, self.heads, depth)  # W_g
        self.decay_proj = projection(d, self.heads, depth)  # W_lambda
        self.value_mix = nn.Parameter(torch.empty(self.heads))  # gamma
        self.value_log_scale = nn.Parameter(torch.empty(self.heads))
        self.bandwidth_base = nn.Parameter(torch.empty(self.heads))
        self.bandwidth_slope = nn.Parameter(torch.empty(self.heads))
        self.bandwidth_exponent = nn.Parameter(torch.empty(self.heads))

    def forward(self, y, place, state=None):
        """What the new tokens read, [B, T, d] -> [B, T, d]; `state` holds the past and goes on."""
        raw_keys, raw_values = (proj(y).unflatten(-1, (self.heads, -1)) for proj in (self.key_proj, self.value_proj))
        gates, decays = self.gate_proj(y), -self.decay_proj(y).abs()
        with torch.autocast(y.device.type, enabled=False):  # sums and scores stay in fp32
            keys, scan = unit_keys(raw_keys, gates, decays, place.resets, state.scan if state else None)
            if state is None:
                stored, first = (keys, self._complete(raw_values)), 0
            else:
                state.scan = scan
                state.append(keys, raw_values, self._complete)
                stored, first = state.pairs(), state.first
            starts = None if place.starts is None else place.starts - first
            read = read_memory(
                keys, *stored, self._bandwidth(), starts, self.window, self.delay, offset=place.time - first
            )
        return read.flatten(2)

    def _complete(self, raw_values, following=None):
        """Equation (9); alpha_psi = exp(min(theta, 15))."""
        scale = self.value_log_scale.to(wide_dtype(self.value_log_scale)).clamp(max=15).exp()
        return look_ahead_values(raw_values, self.value_mix, scale, following)

    def _bandwidth(self):
        """beta_0, beta_1 and alpha of equation (6)."""
        wide = wide_dtype(self.bandwidth_base)
        base, slope = (x.to(wide).clamp(max=10).exp() for x in (self.bandwidth_base, self.bandwidth_slope))
        return base, slope, self.bandwidth_exponent.to(wide).abs().clamp(max=1)


class MemoryMosaicPersistentMemory(nn.Module):
    """SwiGLU: memory whose pairs are fixed by training."""

    def __init__(self, config, depth):
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = projection(d, inner, depth)
        self.up_proj = projection(d, inner, depth)
        self.down_proj = projection(inner, d, depth)

    def forward(self, y):
        return self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class MemoryMosaicLayer(GradientCheckpointingLayer):
    """Contextual memories, then the persistent one."""

    def __init__(self, config, depth):
        super().__init__()
        d = config.hidden_size
        self.depth = depth
        self.memory_norm = MemoryMosaicRMSNorm(d, config.rms_norm_eps)
        self.short_term = MemoryMosaicMemory(config, depth, config.short_term_window, delay=1)
        self.long_term = MemoryMosaicMemory(config, depth, None, delay=config.long_term_delay)
        self.out_proj = projection(2 * d, d, depth)
        self.out_proj.initial_sigma *= math.sqrt(2)  # table 6 counts the width of one memory
        self.persistent_norm = MemoryMosaicRMSNorm(d, config.rms_norm_eps)
        self.persistent = MemoryMosaicPersistentMemory(config, depth)

    def forward(self, hidden_states, place, cache=None):
        short, long = cache.memories[self.depth] if cache is not None else (None, None)
        y = self.memory_norm(hidden_states)
        memories = torch.cat([self.short_term(y, place, short), self.long_term(y, place, long)], -1)
        hidden_states = hidden_states + self.out_proj(memories)
        return hidden_states + self.persistent(self.persistent_norm(hidden_states))


class MemoryMosaicPreTrainedModel(PreTrainedModel):
    config_class = MemoryMosaicConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MemoryMosaicLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Table 6."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            sigma = getattr(module, "initial_sigma", 1 / math.sqrt(2 * self.config.hidden_size))
            nn.init.trunc_normal_(module.weight, std=sigma, a=-3 * sigma, b=3 * sigma)
        elif isinstance(module, MemoryMosaicRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MemoryMosaicMemory):
            nn.init.uniform_(module.value_mix)
            nn.init.zeros_(module.value_log_scale)
            nn.init.constant_(module.bandwidth_base, 1.5)
            nn.init.constant_(module.bandwidth_slope, 1.5)
            nn.init.constant_(module.bandwidth_exponent, 1 / 3)


class MemoryMosaicModel(MemoryMosaicPreTrainedModel):
    """The model below its classifier."""

    _keys_to_ignore_on_load_unexpected = [r"lm_head\.weight"]

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MemoryMosaicLayer(config, depth) for depth in range(config.num_hidden_layers)])
        self.norm = MemoryMosaicRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        document_ids=None,
        past_key_values=None,
        **kwargs,
    ):
        """Activations after the last norm, [B, T, d].

        attention_mask: [B, T] or [B, past + T], 0 for tokens that count as absent; on any side, and with a cache in
        front of a row's first token only. document_ids: int [B, T] for packed rows; neighbours with equal ids are one
        document, and no document reads another. position_ids are not used, but where they do not count up by one in a
        row without mask and cache, they mark packed documents. cache, or past_key_values: a MemoryMosaicCache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("a Memory Mosaic returns no attention maps: leave output_attentions out")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, MemoryMosaicCache):
            raise ValueError(f"the cache is a {type(cache).__name__}: a Memory Mosaic needs a MemoryMosaicCache")
        document_ids = packed_documents(document_ids, position_ids, attention_mask, cache, x)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and document_ids is None
        if document_ids is not None and (use_cache or cache is not None):
            raise ValueError("packed documents cannot be cached: pass use_cache=False, and no cache")
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = MemoryMosaicCache(self.config)

        order, padding = sort_padding(attention_mask, x)
        if order is not None:
            x = x.gather(1, order[..., None].expand_as(x))
            document_ids = None if document_ids is None else document_ids.expand_as(order).gather(1, order)
        place = self._place(x, document_ids, padding, cache)
        seen = (x,)
        for depth, layer in enumerate(self.layers, 1):
            x = layer(x, place, cache=cache)
            x = self.norm(x) if depth == len(self.layers) else x
            seen = (*seen, x) if output_hidden_states else (x,)
        if cache is not None:
            cache.length += x.shape[1]
        if order is not None:
            back = order.argsort(1)
            seen = tuple(h.gather(1, back[..., None].expand_as(h)) for h in seen)
        return BaseModelOutputWithPast(
            last_hidden_state=seen[-1], hidden_states=seen if output_hidden_states else None, **{CACHE: cache}
        )

    @staticmethod
    def _place(x, document_ids, padding, cache):
        """Where documents begin; the cache learns how much padding lies in front of its rows."""
        B, T = x.shape[:2]
        time = cache.length if cache is not None else 0
        times = torch.arange(time, time + T, device=x.device)
        if document_ids is not None:
            resets = torch.ones_like(document_ids, dtype=torch.bool)
            resets[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
            if padding is not None:
                resets = resets | (times == padding[:, None])
            return Place(time, torch.where(resets, times, 0).cummax(1).values, resets)
        starts = cache.starts if cache is not None else None
        if padding is not None:
            starts = torch.zeros_like(padding) if starts is None else starts
            if bool(((padding > 0) & (starts < time)).any()):
                raise ValueError("attention_mask has padding behind tokens that are in the cache: pad on the left")
            starts = starts + padding
        if cache is not None:
            cache.starts = starts
        if starts is None:
            return Place(time)
        return Place(time, starts[:, None].expand(B, T), times == starts[:, None])


def packed_documents(document_ids, position_ids, attention_mask, cache, x):
    """The document ids that were given, or [B, T] where position_ids of rows without mask and past do not count up by one,
    else None. x: ids or embeddings, [B, T, ...]."""
    past = cache.length if isinstance(cache, MemoryMosaicCache) else 0
    if document_ids is not None or attention_mask is not None or past:
        return document_ids
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != x.shape[1]:
        return None
    breaks = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if not bool(breaks.any()):
        return None
    return F.pad(breaks.long().cumsum(1), (1, 0)).expand(x.shape[0], -1)


def sort_padding(attention_mask, x):
    """The order [B, T] that brings each row's padding to its front (None: it is there), and how much there is, [B]."""
    if attention_mask is None:
        return None, None
    B, T = x.shape[:2]
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}: give [batch, tokens], 1 for each real token")
    real = attention_mask[:, -T:].to(x.device) != 0
    if bool(real.all()):
        return None, None
    order = real.to(torch.int8).argsort(dim=1, stable=True)
    in_order = bool((order == torch.arange(T, device=x.device)).all())
    return (None if in_order else order), (~real).sum(1)


def labels_within_documents(labels, attention_mask, document_ids):
    """`labels` without those that would be predicted from padding or from another document."""
    if attention_mask is not None:
        padding = attention_mask[:, -labels.shape[1] :].to(labels.device) == 0
        labels = labels.masked_fill(F.pad(padding[:, :-1], (1, 0)), -100)
    if document_ids is not None:
        document_ids = document_ids.to(labels.device)
        labels = labels.masked_fill(F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0)), -100)
    return labels


class MemoryMosaicForCausalLM(MemoryMosaicPreTrainedModel, GenerationMixin):
    """A Memory Mosaic with its classifier."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = MemoryMosaicModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = projection(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        document_ids=None,
        past_key_values=None,
        **kwargs,
    ):
        """Logits [B, T, V], or of the last `logits_to_keep` positions (an index tensor: of those); with `labels`
        [B, T] (the input ids, -100 where nothing is to be learned) also the loss of predicting each from those before
        it in its document. The other arguments are MemoryMosaicModel's."""
        cache, x = past_key_values if cache is None else cache, input_ids if inputs_embeds is None else inputs_embeds
        if x is not None:  # for the loss, too, and before the cache goes on
            document_ids = packed_documents(document_ids, position_ids, attention_mask, cache, x)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids if x is None else None,  # what they say of documents is said
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            document_ids=document_ids,
            output_attentions=kwargs.pop("output_attentions", None),
            return_dict=True,
        )
        wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, wanted])
        loss = None
        if labels is not None:
            labels = labels_within_documents(labels, attention_mask, document_ids)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )

    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, document_ids=None, **kwargs):
        if document_ids is not None:
            raise ValueError("generate() continues one document a row: leave document_ids out")
        return super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """generate() asks here for a cache; a Memory Mosaic only has its own."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}: a Memory Mosaic has its own cache, leave it out")
        given = model_kwargs.get(CACHE)
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = MemoryMosaicCache(self.config)


__all__ = ["MemoryMosaicCache", "MemoryMosaicForCausalLM", "MemoryMosaicModel", "MemoryMosaicPreTrainedModel"]

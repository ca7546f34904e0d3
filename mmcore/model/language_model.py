"""What the architectures share: embedding, blocks, classifier; training loss, decoding, knocked-out memories."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmcore.config import ModelConfig
from mmcore.errors import ConfigError
from mmcore.kernels.dispatch import autocasting
from mmcore.kernels.linear_cross_entropy import linear_cross_entropy
from mmcore.kernels.linear_cross_entropy.reference import of_logits
from mmcore.kernels.registry import watched
from mmcore.model.documents import packing
from mmcore.model.layers import Linear, RMSNorm, advanced, draw_normal, fan_in_sigma, is_plain
from mmcore.model.state import DecodingState


class Backbone(nn.Module):
    """The part of a language model below its classifier."""

    def __init__(
        self, config: ModelConfig, layers: Iterable[nn.Module], kernels: str, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=torch.empty(
            config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(layers)
        self.norm = norm or RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)


class Classifier(Linear):
    """Activations -> logits over the vocabulary, or at once the loss: [..., d] -> [..., V]."""

    def __init__(self, config: ModelConfig, kernels: str) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.kernels = kernels

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """Cross-entropy in nats of labels int64 [N] from activations [N, d], without N x V logits.

        A method of the module that owns the weight, so that sharding can gather the weight around the call.
        """
        if self.bias is not None:
            return of_logits(Linear.forward(self, hidden), labels, reduction)
        return linear_cross_entropy(
            hidden, self.exact_weight(), labels, reduction=reduction, implementation=self.kernels
        )


def _loss(head: nn.Module, hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """`Classifier.loss` of whatever is the classifier: a hook, a bias, an adapter or another layer cost N x V logits, unless
    it has a loss of its own (sharding puts one around a Classifier's)."""
    theirs = getattr(type(head), "loss", None)  # not the method's own function, of which torch.compile knows nothing
    own = "loss" in head.__dict__ or theirs not in (None, Classifier.loss)
    if own or (theirs is not None and is_plain(head) and not hidden.is_meta):  # there logits take no memory
        return head.loss(hidden, labels, reduction)
    return of_logits(head(hidden), labels, reduction)


class LanguageModel(nn.Module):
    """Tokens -> logits. A block has `forward(x, packing, delay, without)`, `advance(x, states, delay, without, wanted)`,
    `new_states(owner)`, `init_weights(name, depth, seed)`, and the class attributes MEMORIES, what can be removed, and
    READS, what of it keeps a state."""

    def __init__(
        self, config: ModelConfig, layers: Iterable[nn.Module], kernels: str = "auto", norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.model = Backbone(config, layers, kernels, norm)
        self.lm_head = Classifier(config, kernels)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.knocked_out: frozenset[str] = frozenset()
        self.stop_ids: frozenset[int] = frozenset()  # tokens that end a text, as the checkpoint's config.json says

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Draw every parameter (table 6); the same seed gives the same weights in any order and on any rank."""
        width = self.config.hidden_size
        draw_normal("embed_tokens", self.model.embed_tokens.weight, fan_in_sigma(width), seed)
        if not self.config.tie_word_embeddings:
            draw_normal("lm_head", self.lm_head.weight, fan_in_sigma(width), seed)
        for depth, layer in enumerate(self.model.layers):
            layer.init_weights(f"layers.{depth}", depth, seed)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1)

    def without(self, memories: Iterable[str]) -> LanguageModel:
        """Make the named memories read as empty, and the others not. Raises ConfigError for one it does not have."""
        memories = frozenset(memories)
        known = type(self.model.layers[0]).MEMORIES
        for name in memories - set(known):
            raise ConfigError(f"a {self.config.model_type} has no memory {name!r} to remove: choose from {', '.join(known)}")
        self.knocked_out = memories
        return self

    @property
    def classifier_weight(self) -> Tensor:
        """W_c, [V, d]."""
        return self.lm_head.exact_weight()

    def quantize(self) -> LanguageModel:
        """Keep every matrix but the embedding in int8, for inference: a quarter of fp32's bytes to read for a token. What
        is left (norms, scalars, embedding) is as it was."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.quantize()
        return self

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] -> [B, T, d]; on a CPU and under autocast the residual stream is at least fp32, whatever the weights
        are kept in."""
        x = self.model.embed_tokens(tokens_BT)
        wide = x.is_cpu or autocasting(x.device.type)
        return x.float() if wide and x.dtype in (torch.bfloat16, torch.float16) else x

    def hidden(self, tokens: Tensor, documents: Tensor | None = None, delay: int | None = None) -> Tensor:
        """Activations after the last norm, [B, T, d], for tokens int64 [B, T] and document ids int [B, T].

        `delay` is m of the long-term memories; None takes the configuration's, which is for inference. Raises ConfigError
        for other shapes.
        """
        if tokens.ndim != 2 or (documents is not None and documents.shape != tokens.shape):
            shapes = " and ".join(str(list(x.shape)) for x in (tokens, documents) if x is not None)
            raise ConfigError(f"tokens, and documents where they are given, must be [rows, tokens], and are {shapes}")
        delay = self.config.long_term_delay if delay is None else delay
        where = packing(documents)
        x = self.embed(tokens)
        for layer in self.model.layers:
            x = layer(x, where, delay, self.knocked_out)
        return self.model.norm(x)

    def forward(self, tokens: Tensor, documents: Tensor | None = None, delay: int | None = None) -> Tensor:
        """Logits [B, T, V]."""
        return self.lm_head(self.hidden(tokens, documents, delay))

    def loss(
        self, tokens: Tensor, labels: Tensor, documents: Tensor | None = None, delay: int | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """Cross-entropy in nats of labels int64 [B, T], -100 for none, without T x V logits where the classifier is as it
        was built.

        A scalar, or [B, T] with reduction="none".
        """
        hidden = self.hidden(tokens, documents, delay)
        loss = _loss(self.lm_head, hidden.flatten(0, 1), labels.flatten(), reduction)
        return loss.view(labels.shape) if reduction == "none" else loss

    def new_state(self, batch_size: int = 1, padding: Tensor | None = None) -> DecodingState:
        """An empty state for `batch_size` rows; `padding` int [B] counts the tokens that fill each row on the left.
        Raises ValueError where there is no row, or not one number for each.

        It goes with the weights it begins with, for what it remembers was made with them: begin another where parameters
        change, a part of the model is replaced or it is quantized, which the steps of a state that has begun may see in
        part or not at all. Hooks may be registered at any time; a state that has met one goes on without the compiled step.
        """
        if batch_size < 1:
            raise ValueError(f"new_state got a batch of {batch_size} rows: give at least 1")
        if padding is not None:
            if padding.shape != (batch_size,) or padding.is_floating_point():
                got = f"{padding.dtype} {tuple(padding.shape)}"
                raise ValueError(f"new_state got padding {got} for {batch_size} rows: give int {(batch_size,)}")
            padding = padding.to(torch.int64).contiguous()  # as the compiled steps read it
        block = type(self.model.layers[0])
        state = DecodingState(batch_size, padding, block.pair_dtype(self) if hasattr(block, "pair_dtype") else None)
        for depth, layer in enumerate(self.model.layers):
            state.memories.update({f"layers.{depth}.{name}": memory for name, memory in layer.new_states(state).items()})
        return state

    def takes_back(self, state: DecodingState) -> bool:
        """Whether, of a token that is fed to `state` next, `state.take_back()` can leave no trace. A GPU's steps can, but
        for the first and those that move a store: it may be asked for the step on a token that is not known to be wanted."""
        if self.knocked_out or watched() or not state.length or not state.whole_step:
            return False
        return getattr(self._step_of(state), "takes_back", False)

    def _step_of(self, state: DecodingState) -> Callable | bool:
        """The state's compiled step: made when it is first wanted, which takes 1 ms, given up where the model has been hung
        with hooks since, which a step passes over."""
        handles, block = RemovableHandle.next_id, type(self.model.layers[0])
        if state.whole_step is None:
            state.whole_step = self._whole_step()
        elif state.whole_step and state.handles != handles and not (hasattr(block, "as_built") and block.as_built(self)):
            state.whole_step = False
        state.handles = handles
        return state.whole_step

    def _whole_step(self) -> Callable | bool:
        """A compiled form of `advance`, where the architecture has one and it can run here, else False."""
        block = type(self.model.layers[0])
        ours = ("auto", "triton") if next(self.parameters()).is_cuda else ("auto", "cpu")
        return block.whole_step(self) if hasattr(block, "whole_step") and self.kernels in ours else False

    def advance(self, tokens: Tensor, state: DecodingState, last_only: bool = True) -> Tensor:
        """Feed the next tokens int64 [B, T] of each row: logits [B, V] after the last, or [B, T, V] after each.

        `state` goes on. Equal to the full forward pass over all that was fed, whatever the sizes of the pieces, with the
        weights that the state began with; see `new_state`. Raises ValueError where the rows are not the state's, or there is
        no token.
        """
        rows, count = tokens.shape
        if rows != state.batch_size or count == 0:
            raise ValueError(
                f"advance got tokens {(rows, count)} for a state of {state.batch_size} rows: give each of them one or more"
            )
        step = state.whole_step
        if (
            step and step.takes_ids and count == 1 and tokens.dtype is torch.int64 and not self.knocked_out
            and state.handles == RemovableHandle.next_id and not watched()
        ):  # fmt: skip
            # As little of Python and PyTorch as may be: every line costs microseconds with caches that hold weights.
            logits = step(tokens, tuple(state.memories.values()), state.length, state.padding, last_only)
            state.length += 1
            return logits
        return self._advance(tokens, state, last_only)

    @torch.no_grad()
    def _advance(self, tokens: Tensor, state: DecodingState, last_only: bool) -> Tensor:
        T = tokens.shape[1]
        one = T == 1 and state.length > 0
        if (one or tokens.is_cpu) and not self.knocked_out and not watched():
            step = self._step_of(state)
            if step and (one or step.pieces):
                logits = step(self.embed(tokens), tuple(state.memories.values()), state.length, state.padding, last_only)
                state.length += T
                return logits
        x, last = self.embed(tokens), len(self.model.layers) - 1
        for depth, layer in enumerate(self.model.layers):
            states = {name: state.memories[f"layers.{depth}.{name}"] for name in layer.READS}
            # The last layer need not finish positions that nobody asks for: 9 % of a prefill at 8 layers.
            wanted = 1 if last_only and depth == last else T
            x = advanced(layer, x, states, self.config.long_term_delay, self.knocked_out, wanted)
        state.length += T
        logits = self.lm_head(self.model.norm(x))
        return logits[:, -1] if last_only else logits

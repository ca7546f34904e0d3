"""What a model costs: parameters, FLOPs a token, bytes. One formula each, used by --plan, MFU and reports alike.

A multiply-add is two FLOPs. Two kinds of work are kept apart: the matrix products with weights, the same for
every token (the paper's "FLOPs per token"), and the memory reads (attention), which grow with the pairs that are
really read. Norms, gates and other element-wise work, under 1 % at any size that matters, are not counted. No
torch here: everything follows from the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable

from mmcore.config import ModelConfig
from mmcore.kernels.loss_chunks import chunk_rows

FP32 = 4
"""Bytes of a master weight, a gradient, and of each of AdamW's two moments."""


def parameters(config: ModelConfig) -> dict:
    """Parameters of the model, counted once each.

    `total`; `without_long_term`, what is left when the long-term memories and the columns of W_o that read them are
    gone (equal to `total` for a Llama, which has none); `embedding`, both matrices where they are not tied;
    `blocks`; `final_norm`; and `by_part`, which splits `total`.
    """
    layers, d = config.num_hidden_layers, config.hidden_size
    block = _block_parameters(config)
    embedding = config.vocab_size * d
    classifier = 0 if config.tie_word_embeddings else embedding
    by_part = {"embedding": embedding, "classifier": classifier}
    by_part |= {name: layers * count for name, count in block.items()}
    final_norm = _norm_parameters(config)
    by_part["norms"] += final_norm
    total = sum(by_part.values())
    long_term = 0
    if "long_term" in block:
        long_term = layers * (block["long_term"] + block["output"] // 2)
    return {
        "total": total,
        "without_long_term": total - long_term,
        "embedding": embedding + classifier,
        "blocks": layers * sum(block.values()),
        "final_norm": final_norm,
        "by_part": by_part,
    }


def flops_per_token(config: ModelConfig, without: Iterable[str] = ()) -> int:
    """Forward FLOPs a token of the products with weight matrices, classifier included, embedding look-up not.

    `without` leaves out memories as knocking them out does. The paper prints 18.9e9 for its 8b (15.6e9 without the
    long-term memories) and 16.7e9 for the transformer; this gives 18.8, 15.6 and 16.6.
    """
    without = frozenset(without)
    matrices = _block_matrices(config)
    if "output" in matrices and matrices.keys() & {"short_term", "long_term"}:
        kept = 2 - len(without & {"short_term", "long_term"})
        matrices["output"] = matrices["output"] * kept // 2
    block = sum(count for name, count in matrices.items() if name not in without)
    return 2 * (config.num_hidden_layers * block + config.vocab_size * config.hidden_size)


def read_flops_per_token(config: ModelConfig, context: int, delay: int | None = None, dense: bool = False) -> float:
    """Forward FLOPs a token of the memory reads (attention), averaged over the positions of one document of
    `context` tokens: 4 D a head for each pair that is read, the product with the query and that with the weight.

    `delay` is m of the long-term memories; None means the average over the draws of training. `dense` counts
    context pairs for every query, masked or not, as an implementation with a full T x T matrix computes.
    """
    pairs = pairs_per_query(config, context, delay)
    if dense:
        # a v1 mosaic leaves the newest pairs, which no query reads, out of the matrix
        pairs = {name: float(context - (min(context, config.v1.value_shift) if config.v1 else 0)) for name in pairs}
    width = config.num_attention_heads * config.head_size
    return config.num_hidden_layers * 4 * width * sum(pairs.values())


def pairs_per_query(config: ModelConfig, context: int, delay: int | None = None) -> dict[str, float]:
    """Pairs that a query reads in each memory of a layer, averaged over the positions of `context` tokens.

    Short-term: t-h+1 .. t-1; long-term: 1 .. t-m; attention: 1 .. t (the short-term attention of
    long_short_transformer has its own token too); the contextual memory of a v1 mosaic: 1 .. t-1. `delay` None
    averages m over config.long_term_delay_range.
    """
    if config.model_type == "llama":
        return {"attention": _mean_delayed(context, 0)}
    if config.v1:
        return {"contextual": _mean_delayed(context, config.v1.value_shift)}
    low, high = config.long_term_delay_range if delay is None else (delay, delay)
    long_term = sum(_mean_delayed(context, m) for m in range(low, high + 1)) / (high - low + 1)
    if config.model_type == "long_short_transformer":
        return {"short_term": _mean_window(context, config.short_term_window - 1) + 1, "long_term": long_term}
    return {"short_term": _mean_window(context, config.short_term_window - 1), "long_term": long_term}


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs a token of a training step: forward, and twice that backward. Work done again (activation
    checkpointing, scores recomputed in a memory's backward pass) is not useful work and is not counted, so that
    utilization compares across settings. Sequences are taken as one document each: an upper bound for packed ones."""
    return 3 * (flops_per_token(config) + read_flops_per_token(config, sequence_length))


def checkpoint_bytes(config: ModelConfig) -> dict[str, int]:
    """Bytes on disk of a training checkpoint: fp32 weights and AdamW's two moments."""
    count = parameters(config)["total"]
    return {"weights": FP32 * count, "optimizer": 2 * FP32 * count, "total": 3 * FP32 * count}


def activation_bytes(
    config: ModelConfig, tokens: int, compute_bytes: int, checkpointing: str = "none", inner_bytes: int | None = None
) -> int:
    """Bytes that one micro-batch of `tokens` tokens holds at the peak of a step: what the blocks keep for their
    backward pass, and the gradients of one block's activations.

    `compute_bytes` are those of a value in the products: 4 in fp32, 2 under bf16 autocast, where the residual stream,
    the norms and the key recurrence stay in fp32; `inner_bytes` those of a value between the products of the persistent
    memory, where they are others (2 on a CPU that rounds what its products read). With checkpointing "full" each block
    keeps its input only, and one block at a time is computed again; "selective" leaves out what `mmcore.kernels.recompute`
    makes again. Equal within 10 % to what autograd keeps in this code's models (see tests).
    """
    d = config.hidden_size
    inner_bytes = inner_bytes or compute_bytes
    passing = tokens * (2 * inner_bytes * _inner_width(config) + 4 * compute_bytes * d)
    ends = tokens * (FP32 + compute_bytes) * d  # the last norm's input, and its output for the classifier
    again = {
        "none": 0,
        "selective": tokens * _remade_bytes_per_token(config, compute_bytes, inner_bytes),
        "full": tokens * _kept_bytes_per_token(config, compute_bytes, inner_bytes),
    }[checkpointing]
    return kept_bytes(config, tokens, compute_bytes, checkpointing, inner_bytes) + again + passing + ends


def kept_bytes(
    config: ModelConfig, tokens: int, compute_bytes: int, checkpointing: str = "none", inner_bytes: int | None = None
) -> int:
    """Bytes of `activation_bytes` that the blocks hold between the forward and the backward pass, which lets go of them
    block by block."""
    if checkpointing == "full":
        return config.num_hidden_layers * tokens * FP32 * config.hidden_size
    inner_bytes = inner_bytes or compute_bytes
    again = _remade_bytes_per_token(config, compute_bytes, inner_bytes) if checkpointing == "selective" else 0
    return config.num_hidden_layers * tokens * (_kept_bytes_per_token(config, compute_bytes, inner_bytes) - again)


def loss_bytes(config: ModelConfig, tokens: int, compute_bytes: int, cpu: bool) -> int:
    """Bytes of the loss at its peak: a chunk of logits (with an fp32 copy where products are bf16), and the gradients
    that are made in the forward pass, of the hidden states [N, d] and of the classifier [V, d] in fp32."""
    rows = min(tokens, chunk_rows(config.vocab_size, "cpu" if cpu else "cuda"))
    copies = compute_bytes if compute_bytes == FP32 else compute_bytes + FP32
    gradients = tokens * config.hidden_size * compute_bytes + FP32 * config.vocab_size * config.hidden_size
    return rows * config.vocab_size * copies + gradients


def decoding_state_bytes(config: ModelConfig, value_bytes: int = FP32) -> dict[str, int]:
    """Bytes that one conversation keeps: `fixed`, however long it is, and `per_token`, for each token of it.

    Only long-term memories and attention grow; a short-term memory keeps its last h - 1 pairs, and each memory a key
    recurrence in fp32 with its log scale, and the newest pair that waits for its value.
    """
    layers, d, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    if config.model_type == "llama":
        return {"fixed": 0, "per_token": layers * 2 * config.kv_heads * config.head_size * value_bytes}
    pair = 2 * d * value_bytes
    if config.v1:
        v1, recurrence = config.v1, FP32 * (d + heads)
        pending = v1.value_shift * (pair if v1.value_taps is None else pair // 2)
        inputs = max(v1.key_taps, v1.value_taps or 1) - 1
        if v1.persistent_banks:
            recurrence, inputs = 2 * recurrence, inputs + v1.key_taps - 1
        return {"fixed": layers * (recurrence + pending + inputs * d * value_bytes), "per_token": layers * pair}
    if config.model_type == "long_short_transformer":
        pair = 2 * config.kv_heads * config.head_size * value_bytes
        return {"fixed": layers * (config.short_term_window - 1) * pair, "per_token": layers * pair}
    recurrence = FP32 * (d + heads) + pair
    return {
        "fixed": layers * ((config.short_term_window - 1) * pair + 2 * recurrence),
        "per_token": layers * pair,
    }


def _block_matrices(config: ModelConfig) -> dict[str, int]:
    """Weights of one block that multiply every token, by part."""
    d, heads = config.hidden_size, config.num_attention_heads
    persistent = 3 * d * config.intermediate_size
    if config.model_type == "memory_mosaics_v2":
        memory = 2 * d * d + (2 * heads * d if config.gated_keys else 0)  # W_phi, W_psi; W_g, W_lambda
        return {"short_term": memory, "long_term": memory, "output": 2 * d * d, "persistent": persistent}
    if config.v1:
        v1 = config.v1
        contextual = d * d * (v1.key_taps + (v1.value_taps or 1) + 1)
        # Every token's query meets all trained keys and values.
        slots = 2 * v1.persistent_banks * config.intermediate_size * d
        persistent = d * d * (v1.key_taps + 1) + slots if v1.persistent_banks else 0
        return {"contextual": contextual, "persistent": persistent}
    queries, keys = heads * config.head_size, config.kv_heads * config.head_size
    attention = d * queries + 2 * d * keys
    if config.model_type == "llama":
        return {"attention": attention + queries * d, "persistent": persistent}
    return {"short_term": attention, "long_term": attention, "output": 2 * queries * d, "persistent": persistent}


def _block_parameters(config: ModelConfig) -> dict[str, int]:
    """All parameters of one block, by part: the matrices, the scalars of each mosaic head, biases, the norms."""
    counts = _block_matrices(config)
    if config.v1:
        v1, biases = config.v1, config.hidden_size if config.v1.bias else 0
        counts["contextual"] += (4 if v1.value_taps is None else 3) * config.num_attention_heads + 3 * biases
        if v1.persistent_banks:
            counts["persistent"] += 3 * config.num_attention_heads + 2 * biases
        return counts | {"norms": (2 if v1.persistent_banks else 1) * _norm_parameters(config)}
    if config.model_type == "memory_mosaics_v2":
        for memory in ("short_term", "long_term"):
            counts[memory] += (5 if config.gated_keys else 6) * config.num_attention_heads
    return counts | {"norms": 2 * _norm_parameters(config)}


def _norm_parameters(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.v1 and config.v1.bias else 1)


def _inner_width(config: ModelConfig) -> int:
    """d', where the persistent memory makes activations of that width: a v1 mosaic's trained pairs make none."""
    return 0 if config.v1 else config.intermediate_size


def _mean_window(context: int, width: int) -> float:
    """Mean of min(p, width) over p = 0 .. context-1: the query at p reads the `width` pairs before it."""
    if context <= width + 1:
        return (context - 1) / 2
    return (width * (width + 1) / 2 + (context - 1 - width) * width) / context


def _mean_delayed(context: int, delay: int) -> float:
    """Mean of max(0, p - delay + 1) over p = 0 .. context-1."""
    reach = max(0, context - delay)
    return reach * (reach + 1) / 2 / context


def _kept_bytes_per_token(config: ModelConfig, compute_bytes: int, inner_bytes: int) -> int:
    """Bytes a token that one block keeps for its backward pass.

    Both norms' inputs; what the projections read, one tensor for each norm; raw and finished keys and values of a
    mosaic's memories, or queries, keys, values of attention; what W_o reads; gate, up and their product in the
    persistent memory; and a few scalars a head. A v1 mosaic's persistent memory keeps what it reads
    and no scores, and autocast copies its norms' outputs for each projection; its taps beyond the first are not counted.
    """
    d, heads, inner = config.hidden_size, config.num_attention_heads, _inner_width(config)
    width = heads * config.head_size  # grouped keys and values are repeated to this width before the read
    half = compute_bytes < FP32
    if config.model_type == "memory_mosaics_v2":
        fp32, compute, scalars = (4 * d if half else 0), (4 * d if half else 8 * d) + 2 * d, 12 * heads
    elif config.v1:
        fp32, compute, scalars = (4 * d if half else 0), (7 if half else 9) * d, (8 if half else 12) * heads + 2
    elif config.model_type == "llama":
        fp32, compute, scalars = 0, 4 * width, 2 * heads
    else:
        fp32, compute, scalars = 0, (8 if half else 10) * width, 4 * heads
    return FP32 * (2 * d + fp32 + scalars + 2) + compute_bytes * (2 * d + compute) + inner_bytes * 3 * inner


def _remade_bytes_per_token(config: ModelConfig, compute_bytes: int, inner_bytes: int) -> int:
    """Bytes a token that selective checkpointing spares in one block: what the projections read, the product that W_2
    reads, and where there are two memories what W_o reads and, in fp32, a mosaic's finished values (in bf16 their raw
    form is kept for the look-ahead's own backward pass in fp32, so that keeping it once more would spare nothing). A v1
    mosaic marks nothing as cheap."""
    if config.v1:
        return 0
    d, width = config.hidden_size, config.num_attention_heads * config.head_size
    spared = 2 * d
    if config.model_type != "llama":
        spared += 2 * width
    if config.model_type == "memory_mosaics_v2" and compute_bytes == FP32:
        spared += 2 * d
    return compute_bytes * spared + inner_bytes * config.intermediate_size

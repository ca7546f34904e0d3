"""Training steps and decoding of whole models on a GPU (parts e and f)."""

from __future__ import annotations

import functools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mmcore import planning
from mmcore.config import DistributedConfig, ModelConfig, load_recipe
from mmcore.distributed.float8 import use_float8
from mmcore.distributed.parallelize import parallelize
from mmcore.generation.batch import draw_rows
from mmcore.generation.engine import GREEDY, Session
from mmcore.generation.sampling import Draw
from mmcore.model import accounting, build_model, layers
from tests.benchmarks.gpu_timing import Place, attempt, copy_bandwidth, costliest

RECIPES = Path(__file__).parents[2] / "recipes"
PEAK = 989e12  # bf16 products of an H100 without sparsity
MICRO_BATCHES = 4  # of a step; the recipes have far more
DOCUMENT = 800  # tokens on average
TINY = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                   short_term_window=9, long_term_delay_range=(5, 9), long_term_delay=5)  # fmt: skip


def training(place: Place, report: dict[str, Any]) -> None:
    """Steps of the 1.5b recipe's model on one card, packed documents, bf16 autocast: tokens/s, MFU, memory. As many
    sequences as the plan allows, and one more."""
    _training(place, report, ["1.5b", "1.5b-transformer"], (0, 1))


def smaller_training(place: Place, report: dict[str, Any]) -> None:
    """The same for the 350m and 124m recipes."""
    _training(place, report, ["350m", "350m-transformer", "124m", "124m-transformer"], (0,))


def _training(place: Place, report: dict[str, Any], names: list[str], more: tuple[int, ...]) -> None:
    for name in place.pick(names, ["tiny"]):
        for checkpointing in ("none", "selective"):
            config, length, planned, checkpointing = job(place, name, checkpointing)
            for batch in (planned + extra for extra in more):
                work = functools.partial(_train, place, config, length, batch, checkpointing, place.gpu, "bf16")
                attempt(report, f"{name} compiled, {checkpointing}, {batch} sequences", work)
                place.free()
        if name.endswith("-transformer") and not place.warm:
            most = 4 if name.startswith("1.5b") else planned  # its logits are whole: 4 do not fit, which takes a try to see
            attempt(report, f"{name} Hugging Face compiled", functools.partial(_train_hf, place, config, length, most))
            place.free()


def job(place: Place, name: str, checkpointing: str = "none") -> tuple[ModelConfig, int, int, str]:
    """(model, tokens of a sequence, sequences, checkpointing): the most that --plan says fits on this card."""
    if place.tiny:
        return TINY, 24, 2, checkpointing
    length = 4096
    recipe = load_recipe(RECIPES / f"{name}.yaml", [
        f"training.sequence_length={length}", f"model.max_position_embeddings={length}",
        f"distributed.activation_checkpointing={checkpointing}",
    ])  # fmt: skip
    planned = planning.largest_micro_batch(recipe, planning.parse_machine("1xH100"), 16)
    print(f"  {name}, {checkpointing}: --plan gives micro-batches of {planned}", flush=True)
    return recipe.model, length, max(1, min(planned, 16)), checkpointing if planned else "selective"


def until_it_fits(place: Place, batch: int, work: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """work(batch), with one sequence less wherever memory does not suffice."""
    while True:
        try:
            return work(batch)
        except torch.OutOfMemoryError:
            print(f"  {batch} sequences do not fit", flush=True)
            if batch == 1:
                raise
        batch -= 1
        place.free()


def train_until_it_fits(place: Place, config: ModelConfig, length: int, batch: int, checkpointing: str, compiled: bool,
                        precision: str = "bf16") -> dict[str, Any]:  # fmt: skip
    """`_train` with fewer sequences, in the end with full checkpointing, where memory does not suffice."""

    def work(batch: int, checkpointing: str = checkpointing) -> dict[str, Any]:
        return _train(place, config, length, batch, checkpointing, compiled, precision)

    try:
        return until_it_fits(place, batch, work)
    except torch.OutOfMemoryError:
        if checkpointing == "full":
            raise
    place.free()
    return work(1, "full")


def following(tokens: Tensor) -> Tensor:
    """Labels: the token after each, -100 after the last."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], 1)


def _train(place: Place, config: ModelConfig, length: int, batch: int, checkpointing: str, compiled: bool,
           precision: str, document: int | None = DOCUMENT) -> dict[str, Any]:  # fmt: skip
    torch.compiler.reset()  # a shape that has changed would be compiled as one that changes
    model = _built(place, config)
    if precision == "fp8":
        model = use_float8(model)
    parallelize(model, DistributedConfig(activation_checkpointing=checkpointing), compiled, precision=precision)
    delays = random.Random(0)
    low, high = config.long_term_delay_range

    def loss(tokens: Tensor, documents: Tensor | None) -> Tensor:
        labels = following(tokens)
        return model.loss(tokens, labels, documents, delay=delays.randint(low, high), reduction="sum") / labels.numel()

    found = _steps(place, model, loss, config, length, batch, document)
    return found | {"checkpointing": checkpointing, "tokens_of_a_document": document}


def _built(place: Place, config: ModelConfig) -> Any:
    """The model with weights as they are drawn, but by the device: the CPU's draw, the same everywhere, takes a minute."""
    with torch.device(place.device), mock.patch.object(layers, "_draw", lambda name, weight, seed, fill: fill(weight, None)):
        model = build_model(config, "triton" if place.tiny else "auto")
        model.init_weights(0)
    return model


def _steps(
    place: Place, model: torch.nn.Module, loss, config: ModelConfig, length: int, batch: int, document: int | None = DOCUMENT
) -> dict[str, Any]:
    """Steps of MICRO_BATCHES micro-batches, clipping and fused AdamW; then one micro-batch and one update by themselves.
    `document`: mean tokens of a document, None for whole sequences. The FLOPs of "mfu" are of whole sequences, as is usual."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, config.vocab_size, (batch, length), device=place.device)
    documents = None if document is None else _documents(batch, length, document).to(place.device)

    def forward() -> Tensor:
        with torch.autocast(place.device.type, torch.bfloat16, enabled=place.gpu):
            return loss(tokens, documents)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step(count: int) -> None:
        for _ in range(count):
            forward().backward()
        update()

    first, value = _timed(place, forward)
    print(f"  first forward pass {first:.1f} s, loss {float(value.detach()):.3f}", flush=True)
    value.backward()
    update()
    if place.warm:
        step(1)  # another delay than the first, which is compiled as a constant
        return {"batch": batch}
    step(1)
    spent = statistics.median(_timed(place, functools.partial(step, MICRO_BATCHES))[0] for _ in range(place.pick(4, 1)))
    peak = place.peak_bytes() / 1e9
    parts = []
    for _ in range(3):
        ahead, value = _timed(place, forward)
        parts.append([ahead, _timed(place, value.backward)[0], _timed(place, update)[0]])
    start = time.perf_counter()
    forward().backward()
    host = time.perf_counter() - start  # until the last launch is asked for
    update()
    rate = MICRO_BATCHES * batch * length / spent
    ahead, back, last = (statistics.median(part) * 1e3 for part in zip(*parts, strict=True))
    return {
        "tokens_per_second": rate, "mfu": rate * accounting.training_flops_per_token(config, length) / PEAK,
        "batch": batch, "micro_batches": MICRO_BATCHES, "length": length, "forward_ms": ahead, "backward_ms": back,
        "update_ms": last, "host_ms": host * 1e3, "peak_gb": peak, "kernels_ms": costliest(place, lambda: forward().backward()),
    }  # fmt: skip


def _timed(place: Place, work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds until the device has done it, what it returned)."""
    place.sync()
    start = time.perf_counter()
    result = work()
    place.sync()
    return time.perf_counter() - start, result


def _documents(batch: int, length: int, mean: int) -> Tensor:
    """Numbers of documents [B, T] of `mean` tokens on average: in each sequence the same lengths, quantiles of the exponential
    distribution, in an order of its own, so that all have the same pairs to read. (Drawn anew for each model, as they were
    in the first seven visits, they made up to 5 % of a step.)"""
    count = max(1, round(length / mean))
    quantiles = [-math.log(1 - (i + 0.5) / count) for i in range(count)]
    ends = [round(length * sum(quantiles[: i + 1]) / sum(quantiles)) for i in range(count)]
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    rows = [random.Random(row).sample(lengths, count) for row in range(batch)]
    return torch.stack([torch.repeat_interleave(torch.arange(count), torch.tensor(row)) for row in rows])


def titan_training(place: Place, report: dict[str, Any]) -> None:
    """The same step by torchtitan's Llama: its model, compiled layer by layer as its trainer does, with its compiled loss. It
    reads whole sequences; so ours are beside it once in documents, as trained, and once whole."""
    for name in place.pick(["1.5b-transformer"], []):
        config, length, _, _ = job(place, name)
        attempt(report, f"{name} torchtitan compiled", functools.partial(_train_titan, place, config, length, 4))
        place.free()
    for name in place.pick(["1.5b", "1.5b-transformer"], ["tiny"]):
        config, length, batch, checkpointing = job(place, name, "selective" if name == "1.5b" else "none")
        for mean in (DOCUMENT, None):
            work = functools.partial(_train, place, config, length, batch, checkpointing, place.gpu, "bf16", mean)
            attempt(report, f"{name} compiled, {'whole sequences' if mean is None else 'documents'}", work)
            place.free()


def _train_titan(place: Place, config: ModelConfig, length: int, batch: int) -> dict[str, Any]:
    for name in ("datasets", "datasets.distributed"):  # its data loaders', which take no part
        sys.modules.setdefault(name, mock.MagicMock())
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    shape = TransformerModelArgs(
        dim=config.hidden_size, n_layers=config.num_hidden_layers, n_heads=config.num_attention_heads,
        vocab_size=config.vocab_size, ffn_dim_multiplier=1.5 * config.intermediate_size / (4 * config.hidden_size),
        max_seq_len=length,
    )  # fmt: skip
    criterion = torch.compile(cross_entropy_loss)

    def work(batch: int) -> dict[str, Any]:
        torch.compiler.reset()
        with torch.device(place.device):
            model = Transformer(shape)
        assert model.layers["0"].feed_forward.w1.out_features == config.intermediate_size
        for key, layer in model.layers.named_children():
            model.layers.register_module(key, torch.compile(layer, fullgraph=True))

        def loss(tokens: Tensor, _: Tensor) -> Tensor:
            return criterion(model(tokens), following(tokens)) / tokens.numel()

        return _steps(place, model, loss, config, length, batch)

    return until_it_fits(place, batch, work)


def _train_hf(place: Place, config: ModelConfig, length: int, batch: int) -> dict[str, Any]:
    """Hugging Face's Llama of the same shape, compiled layer by layer, the same step without documents (causal SDPA).
    Its logits are whole: smaller batches fit."""

    def work(batch: int) -> dict[str, Any]:
        torch.compiler.reset()
        model = _llama(place, config, length)
        for layer in model.model.layers if place.gpu else ():
            layer.compile()

        def loss(tokens: Tensor, _: Tensor) -> Tensor:
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

        return _steps(place, model, loss, config, length, batch)

    return until_it_fits(place, batch, work)


def _llama(place: Place, config: ModelConfig, length: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads, max_position_embeddings=max(length, 4096), rms_norm_eps=1e-5,
        tie_word_embeddings=False, attn_implementation="sdpa", pad_token_id=None, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    with torch.device(place.device):
        return LlamaForCausalLM(shape)


def decoding(place: Place, report: dict[str, Any]) -> None:
    """Steps of the 1.5b shape in bf16 after long contexts, by the step's kernels and layer by layer, beside the bytes that
    must be read and beside Hugging Face's Llama of that shape."""
    config = TINY if place.tiny else load_recipe(RECIPES / "1.5b.yaml").model
    bandwidth = copy_bandwidth(place)
    report["copy_gb_s"] = bandwidth / 1e9
    model = _built(place, config)
    dtype = torch.float32 if place.tiny else torch.bfloat16
    model = model.to(dtype).eval()
    # 32 conversations of 32,768 tokens would hold 200 GB
    contexts = [(1, 4096), (1, 32_768), (32, 4096), (8, 32_768)]
    for rows, context in place.pick(contexts[: 1 if place.warm else None], [(1, 40), (2, 40)]):
        for form in ["step", "layers"][: 2 if (rows, context) == contexts[0] else 1] if place.gpu else ["layers"]:
            work = functools.partial(_decode, place, model, rows, context, form, bandwidth)
            attempt(report, f"{rows} x {context} {form}", work)
            place.free()
    if place.gpu:
        model.quantize()
        work = functools.partial(_decode, place, model, 1, 4096, "step", bandwidth)
        attempt(report, "1 x 4096 step int8", work)
    del model, work
    place.free()
    if place.warm:
        return
    for rows, context in place.pick([(1, 4096), (32, 4096), (1, 32_768)], [(1, 40)]):
        attempt(report, f"hf {rows} x {context}", functools.partial(_decode_hf, place, config, dtype, rows, context))
        place.free()


def _decode(place: Place, model: Any, rows: int, context: int, form: str, bandwidth: float) -> dict[str, Any]:
    config, count = model.config, place.pick(64, 8)
    count = count if form == "step" else min(count, 16)  # of which what follows takes 3.3 times as many tokens at most
    state, word = _conversations(place, model, rows, context - 4 * count)
    state.whole_step = False if form == "layers" else None
    for _ in range(4 if place.warm else count):
        word = model.advance(word, state).argmax(-1, keepdim=True)

    def answer(tokens: int) -> None:  # as mm chat goes on, and as generate_batch does
        if rows == 1:
            session = Session(model, state=state)
            session.append(word[0].tolist())
            list(session.stream(tokens))
            word.fill_(session.history[-1])
        else:
            logits = model.advance(word, state)
            draw_rows(model, state, logits, lambda logits, _: Draw(logits, GREEDY, []), frozenset(), tokens)

    lengths = () if place.warm else (count // 8, count // 8, count)  # once for what loads at its first call
    times = {tokens: _timed(place, functools.partial(answer, tokens))[0] for tokens in lengths}
    spent = _slope(times) if times else math.nan
    size = next(iter(state.memories.values())).store.keys.element_size()
    weights = model.lm_head.weight.element_size() * (accounting.parameters(config)["total"] - config.vocab_size * config.hidden_size)
    pairs = accounting.pairs_per_query(config, context, config.long_term_delay)
    read = min(pairs["short_term"], config.short_term_window) + context  # at this position, not on average
    pairs_bytes = rows * config.num_hidden_layers * 2 * config.hidden_size * size * read
    floor = (weights + pairs_bytes) / bandwidth
    found = {"tokens_per_second": rows / spent, "ms": spent * 1e3, "floor_ms": floor * 1e3, "of_floor": floor / spent,
             "peak_gb": place.peak_bytes() / 1e9}  # fmt: skip
    if place.warm:
        return found
    # A wait each: how visits before the seventh counted.
    alone = [_timed(place, lambda: model.advance(word, state).argmax(-1, keepdim=True))[0] for _ in range(count // 2)]
    found["step_and_argmax_ms"] = statistics.median(alone) * 1e3
    graph = getattr(state.whole_step, "_graph", None)
    if graph is not None:  # the last of this state, whose counts they leave behind
        replays = count // 4
        found["replay_ms"] = _timed(place, lambda: [graph.replay() for _ in range(replays)])[0] / replays * 1e3
    return found | {"kernels_ms": costliest(place, lambda: model.advance(word, state))}


def _conversations(place: Place, model: Any, rows: int, length: int) -> tuple[Any, Tensor]:
    """(a state of `rows` rows after `length` tokens, of which the first few were read and random pairs stand for the rest; a
    word for each row to go on with, int64 [rows, 1])."""
    state = model.new_state(rows)
    state.whole_step = False
    tokens = torch.randint(0, model.config.vocab_size, (rows, 8), device=place.device)
    word = model.advance(tokens, state).argmax(-1, keepdim=True)
    for memory in state.memories.values():
        store, missing = memory.store, length - state.length
        if store.window is None:
            like = store.keys[:, :1]
            for _ in range(0, missing, 512):
                part = torch.nn.functional.normalize(torch.randn(rows, 512, *like.shape[2:], device=like.device), dim=-1)
                part = part.to(like.dtype)[:, : min(512, missing)]
                store.append(part, part)
                missing -= part.shape[1]
        else:
            store.first += missing
    state.length = length
    return state, word


@torch.inference_mode()
def _decode_hf(place: Place, config: ModelConfig, dtype: torch.dtype, rows: int, context: int) -> dict[str, Any]:
    """generate() of Hugging Face, its default cache: seconds of the later of the new tokens."""
    model = _llama(place, config, context + 256).to(dtype).eval()
    prompt = torch.randint(2, config.vocab_size, (rows, context), device=place.device)
    times = {}
    for count in place.pick((8, 72), (2, 4)):
        generate = functools.partial(model.generate, prompt, min_new_tokens=count, max_new_tokens=count, do_sample=False)
        times[count] = _timed(place, generate)[0]
    spent = _slope(times)
    return {"tokens_per_second": rows / spent, "ms": spent * 1e3}


def _slope(times: dict[int, float]) -> float:
    """Seconds of a token, from the seconds that few and many take."""
    few, many = sorted(times)
    return (times[many] - times[few]) / (many - few)

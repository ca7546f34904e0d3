"""Compile every Triton kernel for an H100 on a machine without one: registers, spills and shared memory of each.

`python -m tests.benchmarks.compile_for_hopper [--every] [--dtypes bf16,fp32] [--only memory_read]`. Minutes of one core.
With --for-a-card all configurations go into Triton's cache, as a card's own Triton will look for them; nothing is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from mmcore.config import load_recipe
from mmcore.kernels import tuning
from mmcore.kernels.mosaic_step import Matrix
from mmcore.kernels.mosaic_step.graphed import _Fixed
from mmcore.model import build_model
from tests.helpers.hopper import SHARED_LIMIT, Launches, compile_all

RECIPES = Path(__file__).parents[2] / "recipes"
B, T, H, D = 8, 4096, 32, 128
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def gated_scan(dtype: torch.dtype) -> None:
    """Many heads, few, which are read in groups, and one."""
    from mmcore.kernels.gated_scan import triton

    for batch, time, heads in ((B, T, H), (1, 32_768, 16), (1, 32_768, 1)):
        raw, gates = empty(batch, time, heads, D, dtype=dtype), empty(batch, time, heads, dtype=dtype)
        resets = empty(batch, time, dtype=torch.bool)
        keys, _, _, *kept = triton._run(raw, gates, gates, resets, None, None, True)
        triton._run_backward(keys, raw, gates, gates, *kept)


def memory_read(dtype: torch.dtype) -> None:
    """Packed documents with and without a window, the transformers' causal attention, and a decoding step."""
    from mmcore.kernels.memory_read import triton, triton_backward, triton_few

    keys, scalar = empty(B, T, H, D, dtype=dtype), empty(H, dtype=torch.float32)
    starts = empty(B, T, dtype=torch.int32)
    for window, where in ((None, starts), (256, starts), (None, None), (256, None)):
        place = (where, window, 1, 0)
        out, statistics = triton._run(keys, keys, scalar, scalar, scalar, None, *place)
        triton_backward.run_backward(keys, keys, keys, scalar, scalar, scalar, None, *place, out, statistics)
    triton_few.memory_read(empty(B, 1, H, D, dtype=dtype), keys, keys, scalar, scalar, scalar, None, None, 64, T)


def five_products(dtype: torch.dtype) -> None:
    """The candidate for memory_read's backward pass, as part q of a visit times it."""
    from tests.benchmarks import gpu_candidates, gpu_sweep

    if dtype is not torch.bfloat16:
        return
    keys, scalar = empty(B, T, H, D, dtype=dtype), empty(H, dtype=torch.float32)
    statistics = empty(B, H, T, dtype=torch.float32)
    for gather, sums in gpu_sweep.five_kernels(gpu_sweep.FIVE):
        for window, delay in gpu_sweep.READS.values():
            gpu_candidates.run_backward(gather, keys, keys, keys, [scalar] * 3, window, delay, keys, statistics, sums)


@torch.no_grad()
def mosaic_step(dtype: torch.dtype) -> None:
    """A decoding step of the 1.5b shape, one row and eight; of padded rows, and with int8 weights."""
    from mmcore.kernels.mosaic_step import triton
    from mmcore.model.state import DecodingState, MemoryState

    config = dataclasses.replace(load_recipe(RECIPES / "1.5b.yaml").model, num_hidden_layers=1, vocab_size=256)
    with torch.device("meta"):
        model = build_model(config).to(dtype)
    weights = [layer.step_weights(64) for layer in model.model.layers]
    steps = []
    for scaled in (False, True):
        *layers, classifier = [_scaled(part) if scaled else part for part in (*weights, model.lm_head.matrix())]
        steps.append(triton.Step(layers, model.model.norm.weight, classifier, config.num_attention_heads, 1e-5))
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    for rows in (1, 8):
        owner = DecodingState(rows)
        memories = [MemoryState(owner, window) for window in (config.short_term_window, None)]
        for memory in memories:
            memory.pending_key = memory.pending_raw = empty(rows, 1, heads, size, dtype=dtype)
            memory.scan = empty(rows, heads, size, dtype=torch.float32), empty(rows, heads, dtype=torch.float32)
            memory.store.reserve(1, memory.pending_key)
        fixed, _ = _Fixed.of(memories)
        for step in steps:
            for starts in (None, empty(2, rows, dtype=torch.int32)):
                step.bind(memories, fixed, starts)
                step(empty(rows, 1, config.hidden_size, dtype=dtype))


def _scaled(weights):
    """The same with int8 for each matrix."""
    if isinstance(weights, Matrix):
        return Matrix(weights.weight.to(torch.int8), empty(len(weights.weight), dtype=torch.float32))
    if not dataclasses.is_dataclass(weights):
        return weights
    parts = {field.name: _scaled(getattr(weights, field.name)) for field in dataclasses.fields(weights)}
    return dataclasses.replace(weights, **parts)


def small_ones(dtype: torch.dtype) -> None:
    from mmcore.kernels.linear_cross_entropy import triton as loss
    from mmcore.kernels.look_ahead import triton as look_ahead
    from mmcore.kernels.rms_norm import triton as rms_norm
    from mmcore.kernels.swiglu import triton as swiglu

    x, weight = empty(T, 2048, dtype=dtype), empty(2048, dtype=torch.float32)
    y, rstd = rms_norm._run(x, weight, 1e-5)
    rms_norm._run_backward(y, x, weight, rstd)
    swiglu._run(x, x)
    swiglu._run_backward(x, x, x)
    raw, scalar = empty(B, T, H, D, dtype=dtype), empty(H, dtype=torch.float32)
    for following in (None, empty(B, H, D, dtype=dtype)):
        look_ahead._run(raw, scalar, scalar, following)
        look_ahead._run_backward(raw, raw, scalar, scalar, following)
    loss._step(empty(2048, 128_256, dtype=dtype), empty(2048, dtype=torch.int64), True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", action="store_true", help="all configurations, not the first of each")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--only", choices=("gated_scan", "memory_read", "five_products", "mosaic_step", "small_ones"))
    parser.add_argument("--for-a-card", action="store_true", help="fill Triton's cache (TRITON_CACHE_DIR)")
    options = parser.parse_args()
    if options.for_a_card:
        from tests.helpers import no_card  # noqa: F401
    tuning.processors = lambda x: 132
    works = (gated_scan, memory_read, five_products, mosaic_step, small_ones)
    for name in options.dtypes.split(","):
        for work in works:
            if options.only not in (None, work.__name__):
                continue
            if options.for_a_card:
                work(DTYPES[name])
            else:
                with Launches() as seen:
                    work(DTYPES[name])
                for made in compile_all(seen, options.every):
                    print(name, made, "TOO MUCH SHARED MEMORY" if made.shared > SHARED_LIMIT else "", flush=True)


if __name__ == "__main__":
    main()

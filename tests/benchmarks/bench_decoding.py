"""Reading a prompt and decoding after it: this project beside Hugging Face's LlamaForCausalLM of the same shape.

Every side is a process of its own; in each round each side reads the prompt (prefill tokens/s) and then decodes
greedily (tokens/s from the median time of a step, over all rows of the batch). Hugging Face's model is called as
directly as it can be, without generate(): eager with a growing cache, and compiled with a static cache. Ours reads a
prompt in the pieces that `mm chat` and mmcore.generate_batch take. A step must read every weight but the embedding once,
and every key and value that a query looks at: those bytes over the bandwidth of a plain sum of them give the floor of a
step, and the floor over the time of a step the share that is reached. The sum is over ours where they lie, in the same
process and turn: one place in memory is read at 33 GB/s here and another at 60.
After a prompt of more than LONGEST_READ tokens, only its first are read, and random pairs stand for the rest.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.generation.engine import chunk_of
from mmcore.kernels.allocator import keep_pages, move_to_huge_pages
from tests.benchmarks import common

SIDES = ("hf", "hf static compiled", "hf bf16", "mm", "mm bf16", "mm int8", "mm generate", "mm llama")
# bf16 matrix products are up to 130 times slower than fp32 on a CPU without instructions for them: a longer prompt would
# take minutes to read.
LONGEST_BF16_PROMPT = 10**9 if torch.cpu._is_avx512_bf16_supported() else 256


LONGEST_READ = 4096


class HuggingFace:
    """LlamaForCausalLM, stepped by hand."""

    def __init__(self, side: str, shape: common.Shape, length: int) -> None:
        self.model = common.build_llama(shape, length, torch.bfloat16 if side == "hf bf16" else torch.float32).eval()
        self.static = side == "hf static compiled"
        self.length = length
        self.step_model = torch.compile(self.model, dynamic=False) if self.static else self.model
        self.caches: dict[int, Any] = {}
        names = inspect.signature(self.model.forward).parameters  # transformers 5.24 renamed it, and warns of the old name
        self.name = "cache" if "cache" in names else "past_key_values"

    def read(self, prompt: Tensor) -> Tensor:
        self.cache = self._cache(len(prompt))
        return self._words(self.model, prompt)

    def step(self, words: Tensor) -> Tensor:
        return self._words(self.step_model, words)

    def remember(self, rows: int, count: int) -> None:
        """`count` more tokens' keys and values, random."""
        if self.static:
            raise ValueError("a static cache is not filled by hand: read the prompt")
        config = self.model.config
        shape = (rows, config.num_key_value_heads, count, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            self.cache.update(*(torch.randn(shape).to(self.model.dtype) for _ in range(2)), layer)

    def _words(self, model: Callable, words: Tensor) -> Tensor:
        output = model(input_ids=words, use_cache=True, logits_to_keep=1, **{self.name: self.cache})
        return output.logits[:, -1].max(-1, keepdim=True).indices  # faster than argmax

    def _cache(self, rows: int) -> Any:
        from transformers import DynamicCache, StaticCache

        if not self.static:
            return DynamicCache(config=self.model.config)
        if rows not in self.caches:  # the compiled step is tied to the buffers of its cache
            self.caches[rows] = StaticCache(config=self.model.config, max_cache_len=self.length)
        self.caches[rows].reset()
        return self.caches[rows]


class Ours:
    """A model of this project, stepped by hand."""

    def __init__(self, side: str, shape: common.Shape, length: int) -> None:
        dtype = torch.bfloat16 if side == "mm bf16" else torch.float32
        kind = "llama" if side == "mm llama" else "memory_mosaics_v2"
        self.model = common.build_ours(shape, length, dtype, kind).eval()
        if side == "mm int8":
            self.model.quantize()
        move_to_huge_pages(self.model)  # as `load_model` does
        keep_pages()  # as `mm chat` does

    def read(self, prompt: Tensor) -> Tensor:
        self.state = self.model.new_state(len(prompt))
        for piece in prompt.split(chunk_of(len(prompt)), dim=1):
            words = self.step(piece)
        return words

    def step(self, words: Tensor) -> Tensor:
        return self.model.advance(words, self.state).max(-1, keepdim=True).indices

    def pairs(self) -> list[Tensor]:
        """Keys and values that a step reads, as fp32, where a row of a store has a MiB of them and more: a shorter sum takes
        longer to begin than to read."""
        stores = [memory.store for memory in self.state.memories.values()]
        rows = [row[store.used - store.kept : store.used] for store in stores for part in (store.keys, store.values) for row in part]
        return [row.view(torch.float32).flatten() for row in rows if row.nbytes >= 1 << 20]

    def remember(self, rows: int, count: int) -> None:
        config = self.model.config
        shape = (rows, count, config.num_attention_heads, config.hidden_size // config.num_attention_heads)
        for memory in self.state.memories.values():
            memory.store.append(*(F.normalize(torch.randn(shape), dim=-1) for _ in range(2)))
        self.state.length += count


class OursStreaming(Ours):
    """The same through mmcore.generate, as a user of the library streams it. One row."""

    def read(self, prompt: Tensor) -> Tensor:
        import mmcore

        self.stream = iter(mmcore.generate(self.model, prompt[0].tolist(), max_new_tokens=10**6, temperature=0.0))
        return torch.tensor([[next(self.stream)]])

    def step(self, words: Tensor) -> Tensor:
        return torch.tensor([[next(self.stream)]])

    def pairs(self) -> list[Tensor]:
        return []  # they lie in generate's own state


class Decoder:
    """What a side's process serves."""

    def __init__(self, side: str, shape: common.Shape, length: int, threads: int) -> None:
        torch.set_num_threads(threads)
        ours = side.startswith("mm")
        imported = common.load_library(ours)
        kind = HuggingFace if not ours else OursStreaming if side == "mm generate" else Ours
        self.runner = kind(side, shape, length)
        model = self.runner.model
        embedding = model.model.embed_tokens.weight
        weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # int8 weights are buffers
        read = sum(p.numel() * p.element_size() for p in weights.values() if p is not embedding)
        self.facts = {"parameters": common.parameters(model), "bytes_per_step": read,
                      "megabytes_before_the_model": imported}
        self.vocab_size = shape.vocab_size

    @torch.inference_mode()
    def turn(self, rows: int, prompt: int, new: int) -> tuple[float, float, float]:
        """(tokens/s of reading the prompt, tokens/s of decoding after it), both over all rows; and the bytes a second that a
        sum reads of what the steps read."""
        read = prompt if prompt <= LONGEST_READ else 64
        words = torch.randint(0, self.vocab_size, (rows, read), generator=torch.Generator().manual_seed(common.SEED))
        start = time.perf_counter()
        word = self.runner.read(words)
        reading = time.perf_counter() - start
        if prompt > read:
            self.runner.remember(rows, prompt - read)
        times = []
        for _ in range(new):
            start = time.perf_counter()
            word = self.runner.step(word)
            times.append(time.perf_counter() - start)
        return rows * read / reading, rows / statistics.median(times), self.bandwidth()

    def bandwidth(self, repeats: int = 3) -> float:
        """Bytes a second of a plain sum over weights and pairs where they lie, the best of `repeats`; NaN for a model whose
        weights do not lie side by side."""
        weights = [*self.runner.model.parameters(), *self.runner.model.buffers()]
        low = min(weight.data_ptr() for weight in weights)
        end = max(weight.data_ptr() + weight.nbytes for weight in weights)
        if end - low > 1.1 * sum(weight.nbytes for weight in weights):
            return math.nan
        region = (ctypes.c_char * (end - low)).from_address(low)
        read = [torch.frombuffer(region, dtype=torch.float32, count=(end - low) // 4), *self.runner.pairs()]
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for part in read:
                part.sum()
            times.append(time.perf_counter() - start)
        return sum(part.nbytes for part in read) / min(times)

    def bytes_read(self, rows: int, length: int) -> float:
        """Bytes that a step after `length` tokens must read: weights, and the pairs of every layer, key and value."""
        config, runner = self.runner.model.config, self.runner
        pairs, size = length, runner.model.lm_head.weight.dtype.itemsize
        if isinstance(runner, Ours):
            if config.model_type == "memory_mosaics_v2":
                pairs = min(length, config.short_term_window - 1) + max(0, length - config.long_term_delay + 1)
            size = (runner.model.new_state(1).pair_dtype or torch.float32).itemsize
        return self.facts["bytes_per_step"] + rows * pairs * config.num_hidden_layers * 2 * config.hidden_size * size

    def memory(self) -> float:
        return common.memory("VmHWM")


def compare(sides: dict[str, common.Side], rows: int, prompt: int, arguments: Any) -> dict[str, Any]:
    """Every side that can, at one batch size and prompt length."""
    chosen = [
        name for name in sides
        if not (name == "hf bf16" and prompt > LONGEST_BF16_PROMPT) and not (name == "mm generate" and rows > 1)
        and not (name == "hf static compiled" and prompt > LONGEST_READ)
    ]
    calls = {name: lambda side=sides[name]: side.call("turn", rows, prompt, arguments.new) for name in chosen}
    turns = common.take_turns(calls, arguments.rounds)
    report: dict[str, Any] = {"sides": {}, "ratios": {}}
    for name, figures in turns.items():
        reading, decoding, bandwidth = zip(*figures, strict=True)
        must_read = sides[name].call("bytes_read", rows, prompt + arguments.new // 2)
        report["sides"][name] = {
            "prefill": common.figure(reading), "decoding": common.figure(decoding), "bytes_per_step": must_read,
            "rounds": [figure[:2] for figure in figures],
        }
        if math.isfinite(sum(bandwidth)):
            shares = [speed / rows * must_read / most for speed, most in zip(decoding, bandwidth, strict=True)]
            report["sides"][name] |= {"read_bandwidth": common.figure(bandwidth), "share_of_floor": common.figure(shares)}
    theirs = [name for name in chosen if not name.startswith("mm")]
    if theirs:
        for part, what in enumerate(("prefill", "decoding")):
            best = max(theirs, key=lambda name, part=part: statistics.median(pair[part] for pair in turns[name]))
            for name in chosen:
                if name.startswith("mm"):
                    series = ([pair[part] for pair in turns[side]] for side in (name, best))
                    report["ratios"][f"{name} / {best}, {what}"] = common.ratio(*series)
    return report


def show(rows: int, prompt: int, report: dict[str, Any]) -> None:
    print(f"\nbatch {rows}, prompt {prompt}: tokens/s; GB/s that a sum reads; share of the floor")
    for name, side in report["sides"].items():
        floor = f"sum {side['read_bandwidth'].median / 1e9:.1f}   share {side['share_of_floor']:.2f}" if "read_bandwidth" in side else ""
        print(f"  {name:<20} prefill {side['prefill']:7.0f}   decoding {side['decoding']:6.1f}   {floor}")
    for name, value in report["ratios"].items():
        print(f"  {name:<44} {value:5.2f}", flush=True)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="S2")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=32, help="tokens decoded in a turn")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:6]))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    shape = common.SHAPES[arguments.shape]
    report = {"environment": common.environment(), "shape": shape, "cases": {}, "peak_megabytes": {}}
    for prompt in arguments.prompts:
        # New processes for each length: a static cache has one, and peak memory belongs to it.
        sides = {
            name: common.Side(Decoder, name, shape, prompt + arguments.new + 1, arguments.threads)
            for name in arguments.sides
        }
        report["models"] = {name: side.facts for name, side in sides.items()}
        for rows in arguments.batch:
            case = compare(sides, rows, prompt, arguments)
            report["cases"][f"batch {rows}, prompt {prompt}"] = case
            show(rows, prompt, case)
        report["peak_megabytes"][prompt] = {name: side.call("memory") for name, side in sides.items()}
        for side in sides.values():
            side.close()
        common.write(arguments.json, report)
    print("\npeak memory, MB:", {prompt: {name: round(value) for name, value in peaks.items()}
                                 for prompt, peaks in report["peak_megabytes"].items()})


if __name__ == "__main__":
    main()

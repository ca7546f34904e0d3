"""Training steps: this project's models beside Hugging Face's LlamaForCausalLM and litgpt's GPT of the same shape.

A step is forward, backward, clipping of the gradient norm and fused AdamW, in fp32 or ("bf16") with products in bf16 by
autocast, on 4,096 tokens (one sequence where the context is longer). Each side lives in a process of its own and they take turns step by step, or run one after
the other (--apart) where two steps do not fit into memory side by side. Reported are
tokens/s, the ratio step by step, and the highest resident memory of each process. A Memory Mosaic of shape S2 needs
1.15 to 1.18 times the arithmetic of the Llama, so a ratio of 0.86 is equal efficiency.
"""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import torch.nn.functional as F

from mmcore.kernels.allocator import keep_pages
from tests.benchmarks import common, rivals

LEARNING_RATE, BETAS, WEIGHT_DECAY, LARGEST_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0
DELAYS = (64, 256)  # the long-term delay of training is drawn from these, both included
OURS = {"mm": "memory_mosaics_v2", "mm llama": "llama"}
THEIRS = ("hf", "hf compiled", "litgpt", "litgpt compiled")
HALF = " bf16"  # ends the name of a side that computes so
SIDES = [side + ending for side in (*THEIRS, *OURS) for ending in ("", HALF)]


class Trainer:
    """One side: a model with its optimizer, doing steps on request."""

    def __init__(self, side: str, shape: common.Shape, context: int, tokens: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.half, side = side.endswith(HALF), side.removesuffix(HALF)
        self.batch, self.context = max(1, tokens // context), context
        self.ours = side in OURS
        self.delays = random.Random(common.SEED)
        self.words = torch.Generator().manual_seed(common.SEED)
        self.vocab_size = shape.vocab_size
        imported = common.load_library(self.ours)
        if self.ours:
            keep_pages()  # as `mm pretrain` does
            self.model = common.build_ours(shape, context, kind=OURS[side])
        elif side.startswith("litgpt"):
            self.model = rivals.build_litgpt(shape, context)
        else:
            self.model = common.build_llama(shape, context)
        self.litgpt = side.startswith("litgpt")
        self.model.train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.call = torch.compile(self.model) if side.endswith("compiled") else self.model
        self.facts = {"parameters": common.parameters(self.model), "megabytes_before_the_model": imported}

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean loss over all positions but the last of each sequence."""
        if self.litgpt:
            logits = self.call(tokens)[:, :-1]
            return F.cross_entropy(logits.reshape(-1, self.vocab_size), tokens[:, 1:].reshape(-1))
        if not self.ours:
            return self.call(input_ids=tokens, labels=tokens, use_cache=False).loss
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
        return self.model.loss(tokens, labels, delay=self.delays.randint(*DELAYS), reduction="mean")

    def step(self) -> float:
        """One optimizer step; tokens a second."""
        tokens = torch.randint(0, self.vocab_size, (self.batch, self.context), generator=self.words)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            loss = self.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        if not torch.isfinite(loss.detach()):
            raise RuntimeError("the loss is not finite")
        return tokens.numel() / seconds

    def parts(self, repeats: int = 2) -> dict[str, float]:
        """Median seconds of the parts of a step."""
        names = ("forward", "backward", "clip and AdamW")
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            tokens = torch.randint(0, self.vocab_size, (self.batch, self.context), generator=self.words)
            marks = [time.perf_counter()]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                loss = self.loss(tokens)
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            marks.append(time.perf_counter())
            for name, before, after in zip(names, marks, marks[1:], strict=False):
                times[name].append(after - before)
        return {name: common.figure(values).median for name, values in times.items()}

    def profile(self, lines: int) -> str:
        """torch.profiler's table of one step. A kernel in C counts as its autograd function's own time."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
            self.step()
        return record.key_averages().table(sort_by="self_cpu_time_total", row_limit=lines, max_name_column_width=60)

    def memory(self) -> float:
        return common.memory("VmHWM")


def compare(arguments: Any, shape: common.Shape, context: int) -> dict[str, Any]:
    """All sides at one context: figures of each, and ratios of the first of ours to each of theirs."""
    report: dict[str, Any] = {"rounds": {}}
    speeds = report["rounds"]
    for names in [[name] for name in arguments.sides] if arguments.apart else [arguments.sides]:
        sides = {name: common.Side(Trainer, name, shape, context, arguments.tokens, arguments.threads) for name in names}
        speeds |= common.take_turns(
            {name: lambda side=side: side.call("step") for name, side in sides.items()},
            arguments.rounds, arguments.warm_up,
        )  # fmt: skip
        for name, side in sides.items():
            report[name] = {
                "tokens_per_second": common.figure(speeds[name]), "peak_megabytes": side.call("memory"), **side.facts,
            }
            if arguments.parts:
                report[name]["seconds"] = side.call("parts")
            if arguments.profile and name.startswith("mm"):
                print(side.call("profile", arguments.profile))
            side.close()
    ours = [name for name in speeds if name.startswith("mm")]
    theirs = [name for name in speeds if not name.startswith("mm")]
    report["ratios"] = {
        f"{a} / {b}": {
            "speed": common.ratio(speeds[a], speeds[b]),
            "peak_memory": report[a]["peak_megabytes"] / report[b]["peak_megabytes"],
        }
        for a in ours for b in theirs
    }
    return report


def show(context: int, report: dict[str, Any]) -> None:
    print(f"\ncontext {context}: tokens/s (quartiles), peak memory, seconds of forward / backward / update")
    for name, side in report.items():
        if name in ("rounds", "ratios"):
            continue
        seconds = " / ".join(f"{value:.2f}" for value in side.get("seconds", {}).values())
        print(f"  {name:<20} {side['tokens_per_second']:7.0f}  {side['peak_megabytes']:7.0f} MB  {seconds}  "
              f"{side['parameters'] / 1e6:.1f} M parameters", flush=True)
    for name, pair in report["ratios"].items():
        print(f"  {name:<36} speed {pair['speed']:5.2f}   memory {pair['peak_memory']:.2f}", flush=True)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=common.SHAPES, default="S2")
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a step, at least one sequence")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["hf", "mm"],
                        help="litgpt must be installed (pip install --no-deps litgpt lightning)")
    parser.add_argument("--apart", action="store_true", help="one side after the other")
    parser.add_argument("--parts", action="store_true", help="time forward, backward and update by themselves, too")
    parser.add_argument("--warm-up", type=int, default=1, help="turns that do not count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", type=int, nargs="?", const=25, default=0, metavar="LINES",
                        help="the costliest operations of a step of ours")
    arguments = parser.parse_args()
    shape = common.SHAPES[arguments.shape]
    report = {"environment": common.environment(), "shape": shape, "contexts": {}}
    for context in arguments.context:
        report["contexts"][context] = compare(arguments, shape, context)
        show(context, report["contexts"][context])
        common.write(arguments.json, report)  # what comes later may run out of memory, or of time


if __name__ == "__main__":
    main()

"""Taking turns, medians and ratios, sides in processes of their own, and where the figures were taken."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mmcore.kernels import allocator
from mmcore.training.run_folder import cpu_model

SEED = 0


@dataclass(frozen=True)
class Shape:
    """A model size. `label` is how the tables call it."""

    label: str
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    vocab_size: int = 8192


SHAPES = {
    "S1": Shape("S1", 256, 6, 4, 768),
    "S2": Shape("S2", 512, 8, 8, 1536),
    "tiny": Shape("tiny", 64, 2, 2, 128, 512),  # to try a benchmark out in seconds
}


def build_llama(shape: Shape, context: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Hugging Face's LlamaForCausalLM of this shape with random weights, sdpa attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=False,
        attn_implementation="sdpa", pad_token_id=None, bos_token_id=1, eos_token_id=None,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config).to(dtype)


def build_ours(shape: Shape, context: int, dtype: torch.dtype = torch.float32, kind: str = "memory_mosaics_v2") -> Any:
    """This project's model of this shape with random weights."""
    from mmcore.config import ModelConfig
    from mmcore.model import build_model

    config = ModelConfig(
        model_type=kind, vocab_size=shape.vocab_size, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        max_position_embeddings=context,
    )
    model = build_model(config)
    model.init_weights(SEED)
    return model.to(dtype)


def load_library(ours: bool) -> float:
    """Import what a side builds its models with; the resident memory after it, before any model, in MB."""
    if ours:
        import mmcore.model  # noqa: F401
    else:
        import transformers.models.llama.modeling_llama  # noqa: F401
    return memory("VmRSS")


def parameters(model: torch.nn.Module) -> int:
    """Numbers that the model holds."""
    return sum(parameter.numel() for parameter in model.parameters())


def memory(field: str = "VmHWM") -> float:
    """This process's resident memory in MB (10^6 bytes): VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}")


class Side:
    """An object that lives in a process of its own and answers calls, so that two sides share no memory, no thread
    pool and no allocator, yet can take turns."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """`object.method(*arguments)` over there. An exception there is raised here."""
        self._connection.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        self._connection.send(None)
        self._process.join(timeout=30)

    def _receive(self) -> Any:
        try:
            good, value = self._connection.recv()
        except EOFError:
            self._process.join(timeout=5)
            raise RuntimeError(f"a side ended with status {self._process.exitcode}: out of memory?") from None
        if not good:
            raise RuntimeError(value)
        return value


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import traceback

    def answer(work: Callable[[], Any]) -> None:
        try:
            connection.send((True, work()))
        except Exception:  # noqa: BLE001  the other process raises it, whatever it is
            connection.send((False, traceback.format_exc()))

    served = None

    def build() -> dict[str, Any]:
        nonlocal served
        served = make(*arguments)
        return getattr(served, "facts", {})

    answer(build)
    while (request := connection.recv()) is not None:
        method, values = request
        answer(lambda method=method, values=values: getattr(served, method)(*values))


def take_turns(sides: dict[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Call every side once a round, first `warm_up` rounds that do not count; what each returned, in order."""
    results: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, call in sides.items():
            value = call()
            if turn >= warm_up:
                results[name].append(value)
    return results


@dataclass(frozen=True)
class Figure:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def figure(values: list[float]) -> Figure:
    """Median and quartiles of some values."""
    if len(values) == 1:
        return Figure(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(median, low, high)


def ratio(ours: list[float], theirs: list[float]) -> Figure:
    """Ours over theirs, round by round: what drifts within a minute cancels."""
    return figure([a / b for a, b in zip(ours, theirs, strict=True)])


def read_bandwidth(megabytes: int = 160, repeats: int = 5) -> float:
    """Bytes a second that a plain sum reads from memory: the best of `repeats`, from small pages and from large ones."""
    size, best = megabytes * 250_000, 0.0
    for data in (torch.ones(size), allocator.empty((size,), torch.float32).fill_(1)):
        for _ in range(repeats + 1):
            start = time.perf_counter()
            data.sum()
            best = max(best, size * 4 / (time.perf_counter() - start))
    return best


def extra_memory(run: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator holds at the highest moment of `run` beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def limits() -> dict[str, float]:
    """This machine's best at what everything is made of: matrix products (FLOP/s; 1,024 x 1,024), copying (bytes read and
    written a second) and reading from memory."""

    def best(run: Callable[[], object], repeats: int = 7) -> float:
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    n = 1024
    x, y = torch.ones(40_000_000), torch.empty(40_000_000)
    found = {"copy": 8 * x.numel() / best(lambda: y.copy_(x)), "read": read_bandwidth()}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        found[f"product {str(dtype).removeprefix('torch.')}"] = 2 * n**3 / best(lambda a=a, b=b: a @ b)
    return found


def environment() -> dict[str, Any]:
    """Where and with what the figures were taken."""
    versions = {}
    for name in ("torch", "transformers", "litgpt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "device": cpu_model(),
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        "instructions": torch.backends.cpu.get_cpu_capability(), "versions": versions,
        "load_average_at_start": os.getloadavg()[0], "limits": limits(),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    made.add_argument("--rounds", type=int, default=5, help="turns of each side that count")
    return made


def plain(value: Any) -> Any:
    """Figures as dictionaries, for JSON."""
    if isinstance(value, (Figure, Shape)):
        return asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def write(path: Path | None, report: dict[str, Any]) -> None:
    """The report as JSON, if a file was asked for."""
    if path:
        path.write_text(json.dumps(plain(report), indent=2) + "\n")
        print(f"written to {path}")

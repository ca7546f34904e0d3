"""What a training step asks of a GPU's host, measured where there is no GPU: launches of a layer, and the host's time.

    python -m tests.benchmarks.bench_host [--layers 8] [--json FILE]

Needs a PyTorch for CUDA (tests/helpers/stand_in.py). Layers of the 1.5b shape, three sequences of 4,096 tokens. Each figure
is the slope between a few layers and more; times are the least of many steps, for nothing waits for a card and the
machine's own noise only adds. Sides take turns in processes of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from tests.benchmarks import common
from tests.helpers import stand_in

FEW, BATCH, LENGTH = 2, 3, 4096
KINDS = {"mosaic": "memory_mosaics_v2", "our Llama": "llama"}


def child(kind: str, layers: int, how: str, steps: int) -> None:
    """One side: prints what a forward pass and a backward pass took of the host."""
    warnings.filterwarnings("ignore")
    stand_in.install()
    from mmcore.config import DistributedConfig, ModelConfig
    from mmcore.distributed.parallelize import parallelize
    from mmcore.model import build_model

    config = ModelConfig(
        model_type=kind, vocab_size=8192, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers,
        num_attention_heads=16, max_position_embeddings=LENGTH,
    )
    with torch.device("cuda"):
        model = build_model(config)
        tokens, documents = torch.zeros(2, BATCH, LENGTH, dtype=torch.int64)
    parallelize(model, DistributedConfig(activation_checkpointing="none"), how == "compiled", precision="bf16")

    def step() -> list[float]:
        marks = [(time.perf_counter(), stand_in.launches())]
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens, tokens, documents, delay=64, reduction="sum")
        marks.append((time.perf_counter(), stand_in.launches()))
        loss.backward()
        marks.append((time.perf_counter(), stand_in.launches()))
        for parameter in model.parameters():
            parameter.grad = None
        return [b - a for before, after in zip(marks, marks[1:], strict=False) for a, b in zip(before, after, strict=True)]

    for _ in range(3):
        step()
    forward, launched, backward, back = zip(*(step() for _ in range(steps)), strict=True)
    print(json.dumps([min(forward) * 1e3, min(launched), min(backward) * 1e3, min(back)]), flush=True)


def measure(kind: str, layers: int, how: str, steps: int, environment: dict[str, str]) -> list[float]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_host", "--child", kind, str(layers), how, str(steps)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.kill()  # the compiler's helpers wait for a card's driver at the end
    return json.loads(line)


def main() -> None:
    parser = common.parser(__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="the more layers of the slope")
    parser.add_argument("--steps", type=int, default=100, help="of each side and turn")
    parser.add_argument("--child", nargs=4, help="used within")
    options = parser.parse_args()
    if options.child:
        kind, layers, how, steps = options.child
        child(kind, int(layers), how, int(steps))
        return
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = stand_in.environment(Path(folder)) | {"MM_AUTOTUNE": "0"}
        best: dict[tuple[str, str, int], list[float]] = {}
        for _ in range(options.rounds):
            for how in ("compiled", "eager"):
                for name, kind in KINDS.items():
                    for layers in (FEW, options.layers):
                        found = measure(kind, layers, how, options.steps, environment)
                        place = (name, how, layers)
                        best[place] = [min(pair) for pair in zip(found, best.get(place, found), strict=True)]
    print(f"{'a layer':22}{'forward':>18}{'backward':>22}")
    for (name, how, layers), more in best.items():
        if layers == FEW:
            continue
        few = best[name, how, FEW]
        ahead, launched, back, answered = ((b - a) / (layers - FEW) for a, b in zip(few, more, strict=True))
        results[f"{name}, {how}"] = {
            "forward_ms": ahead, "forward_launches": launched, "backward_ms": back, "backward_launches": answered,
        }  # fmt: skip
        print(f"{name + ', ' + how:22}{ahead:8.2f} ms {launched:5.1f} launches{back:8.2f} ms {answered:5.1f} launches")
    common.write(options.json, {"environment": common.environment(), "layers": results})


if __name__ == "__main__":
    main()

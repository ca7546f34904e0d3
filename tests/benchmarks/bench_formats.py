"""What number formats cost a trained Memory Mosaic on a CPU: the loss of held-out text that it decodes token by token, or
reads in pieces, as prompts are.

Each row of the table is a format of the weights, what they meet in the products, and what pairs are kept in. The first is
fp32 throughout. "x in fp32" means the rounded weights in an fp32 model, so that what is left is the weights' own
rounding; elsewhere the kernels round x as this processor lets them.

    python -m tests.benchmarks.bench_formats CHECKPOINT TEXT --tokens 1000 --sequences 4
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import mmcore
from mmcore.model.mosaic import MosaicBlock
from tests.benchmarks import common

PAIRS = {"fp32": None, "fp16": torch.float16}
ROWS = (
    ("fp32", "fp32", "fp32"), ("fp32", "fp32", "fp16"), ("bf16", "fp32", "fp32"),
    ("bf16", "as here", "fp32"), ("bf16", "as here", "fp16"), ("int8", "fp32", "fp32"), ("int8", "as here", "fp32"),
    ("int8", "as here", "fp16"),
)  # fmt: skip


def model_in(checkpoint: str, weights: str, met_by: str) -> Any:
    """The model with weights in this format, or their values in an fp32 model."""
    model = mmcore.load_model(checkpoint).eval()
    if weights == "bf16":
        model.bfloat16()
        return model if met_by == "as here" else model.float()
    if weights == "int8":
        model.quantize()
        if met_by == "fp32":
            exact = {name: module.exact_weight() for name, module in model.named_modules() if hasattr(module, "exact_weight")}
            model = mmcore.load_model(checkpoint).eval()
            for name, weight in exact.items():
                model.get_submodule(name).weight.data.copy_(weight)
    return model


@torch.no_grad()
def losses(model: Any, tokens: Tensor, pairs: str, piece: int) -> Tensor:
    """Nats of tokens[:, 1:], fed `piece` at a time: [rows, length - 1] in float64."""
    with mock.patch.object(MosaicBlock, "pair_dtype", staticmethod(lambda model: PAIRS[pairs])):
        state = model.new_state(len(tokens))
    found = []
    for at in range(0, tokens.shape[1] - 1, piece):
        following = tokens[:, at + 1 : at + 1 + piece]
        logits = model.advance(tokens[:, at : at + following.shape[1]], state, last_only=False)
        found.append(F.cross_entropy(logits.double().transpose(1, 2), following, reduction="none"))
    return torch.cat(found, dim=1)


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("text")
    parser.add_argument("--tokens", type=int, default=1000, help="of each sequence")
    parser.add_argument("--piece", type=int, default=1, help="tokens that are fed at once")
    parser.add_argument("--sequences", type=int, default=4, help="decoded side by side")
    arguments = parser.parse_args()
    text = Path(arguments.text).read_text(encoding="utf-8")[: 20 * arguments.tokens * arguments.sequences]
    ids = mmcore.load_tokenizer(arguments.checkpoint).encode(text)
    tokens = torch.tensor(ids[: arguments.tokens * arguments.sequences]).view(arguments.sequences, -1)
    report: dict[str, Any] = {"environment": common.environment(), "tokens": tokens.numel(), "piece": arguments.piece, "rows": []}
    exact = None
    print(f"{'weights':<8} {'met by x in':<12} {'pairs':<6} {'loss':>8} {'change':>9} {'RMS a token':>12}")
    for weights, met_by, pairs in ROWS:
        found = losses(model_in(arguments.checkpoint, weights, met_by), tokens, pairs, arguments.piece)
        exact = found if exact is None else exact
        change = found - exact
        row = {"weights": weights, "x": met_by, "pairs": pairs, "loss": float(found.mean()), "change": float(change.mean()),
               "rms": float(change.square().mean().sqrt())}  # fmt: skip
        report["rows"].append(row)
        print(f"{weights:<8} {met_by:<12} {pairs:<6} {row['loss']:8.5f} {row['change']:+9.5f} {row['rms']:12.5f}", flush=True)
    common.write(arguments.json, report)


if __name__ == "__main__":
    main()

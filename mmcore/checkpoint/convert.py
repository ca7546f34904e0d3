"""From any readable checkpoint to an exported folder, with a certificate.

Before the result gets its name, source and result read the same 64 tokens; their logits must agree as far as the
result's dtype allows. What was compared, the hashes of both sides, and the versions stand in certificate.json.
"""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import mmcore
from mmcore.checkpoint import disk, hub, untrusted
from mmcore.checkpoint.formats import Checkpoint, open_checkpoint, write_exported
from mmcore.checkpoint.formats.folder import open_folder, tokenizer_files
from mmcore.checkpoint.load import load_tokenizer, model_from
from mmcore.checkpoint.tensorfile import dtype_name
from mmcore.errors import CheckpointError

CERTIFICATE = "certificate.json"
TOKENS = 64

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-1, torch.float16: 1e-2}
"""Largest difference of logits allowed, as a share of the source's largest logit. The same fp32 weights give the
same bits; the others have 8 and 11 significant bits, whose rounding adds up over the layers."""


@dataclass(frozen=True)
class Certificate:
    """What a conversion did, and how far source and result agree."""

    source: str
    source_format: str
    source_files: dict[str, str]
    """File name -> sha256."""
    result: str
    result_files: dict[str, str]
    dtype: str
    tokens: int
    largest_logit: float
    largest_difference: float
    tolerance: float
    """Absolute: the dtype's share of the largest logit."""
    versions: dict[str, str]
    command: str


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
    command: str = "",
) -> Certificate:
    """Write `source` as an exported folder `target`; the baseline becomes a LlamaForCausalLM.

    dtype None keeps the source's (fp32 for fp64). Needs memory for one model in fp32. Raises CheckpointError where
    the source cannot be read, the target is taken or cannot be written, or the two disagree; then nothing is left.
    """
    checkpoint = open_checkpoint(source)
    target = Path(target)
    if target.exists() and target.resolve() == checkpoint.path.resolve():
        raise CheckpointError(f"{target} is the source itself: choose another folder for the result")
    dtype = dtype or (torch.float32 if checkpoint.dtype == torch.float64 else checkpoint.dtype)
    tokens = probe_tokens(checkpoint.config.vocab_size)
    before = _logits(checkpoint, tokens)
    made: list[Certificate] = []

    def certify(folder: Path) -> dict[str, bytes]:
        made.append(_compare(checkpoint, before, folder, target, tokens, dtype, command))
        return {CERTIFICATE: disk.json_bytes(asdict(made[0]))}

    values, files = _hub(checkpoint)
    write_exported(
        target, checkpoint.config, checkpoint.tensors, dtype=dtype, tokenizer_files=files,
        max_shard_bytes=max_shard_bytes, extra=values, force=force, certify=certify,
    )  # fmt: skip
    return made[0]


def probe_tokens(vocab_size: int) -> torch.Tensor:
    """The tokens that both sides read, int64 [1, 64]: spread over the vocabulary, the same on every machine."""
    return (torch.arange(1, TOKENS + 1) * 2_654_435_761 % 2**32 % vocab_size)[None]


def _hub(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What transformers needs beside the weights: keys for config.json, and files."""
    path, given = checkpoint.tokenizer_path, {}
    if path is not None and path.is_dir():
        for name, file in {**tokenizer_files(path), "generation_config.json": path / "generation_config.json"}.items():
            if os.path.lexists(file):
                untrusted.require_regular(file)
                given[name] = file.read_bytes()
    tokenizer = None if path is None or hub.made_elsewhere(given) else load_tokenizer(checkpoint.path)
    keys = ("model_type", "bos_token_id", "eos_token_id", "pad_token_id")
    found = {key: checkpoint.config_json[key] for key in keys if checkpoint.config_json.get(key) is not None}
    values = hub.hub_config({"bos_token_id": None, "eos_token_id": None} | found, tokenizer)
    return values, hub.hub_files(values, tokenizer, given)


@torch.no_grad()
def _logits(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [1, 64, V] in fp32, the weights as they are stored."""
    return model_from(checkpoint, dtype=torch.float32)(tokens).float()


def _compare(checkpoint: Checkpoint, before: torch.Tensor, folder: Path, target: Path, tokens: torch.Tensor,
             dtype: torch.dtype, command: str) -> Certificate:  # fmt: skip
    result = open_folder(folder)
    difference = float((_logits(result, tokens) - before).abs().max())
    largest = float(before.abs().max())
    tolerance = TOLERANCES[dtype] * largest
    if not difference <= tolerance:
        raise CheckpointError(
            f"the result's logits differ from the source's by {difference:.3g}, more than {tolerance:.3g}: choose "
            f"another dtype; nothing was written"
        )
    return Certificate(
        source=str(checkpoint.path),
        source_format=checkpoint.format,
        source_files={path.name: disk.hash_file(path).sha256 for path in checkpoint.weight_files},
        result=str(target),
        result_files={path.name: disk.hash_file(path).sha256 for path in sorted(folder.iterdir())},
        dtype=dtype_name(dtype),
        tokens=TOKENS,
        largest_logit=largest,
        largest_difference=difference,
        tolerance=tolerance,
        versions={"mm": mmcore.__version__, "torch": torch.__version__, "python": platform.python_version()},
        command=command,
    )

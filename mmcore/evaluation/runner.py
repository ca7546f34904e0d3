"""`mm eval`: language-model loss of checkpoints on text, as plain values for tables, JSON and plots."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmcore
from mmcore.checkpoint.load import weight_format
from mmcore.errors import ConfigError, HardwareError, NonFiniteError
from mmcore.evaluation import compressors, position, scoring
from mmcore.evaluation.text import Text, sample
from mmcore.model import accounting

BATCH_TOKENS = 8192
"""Tokens of one forward pass where no batch size is given."""

Progress = Callable[[str, int, int], None]
"""Called as progress(what is being read, tokens read, tokens to read)."""


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    context: int | None = None
    """Tokens of a window of the rolling score; None: the trained context."""
    stride: int | None = None
    """Tokens between two windows; None: half the context."""
    max_tokens: int | None = None
    """At most so many tokens for each of the two measurements; None: all."""
    batch_size: int | None = None
    """Windows in a forward pass; None: about 8,192 tokens."""
    longest: int | None = None
    """Last position of the loss by position; None: 8 times the trained context; 0: not measured."""
    without: tuple[str, ...] = ()
    """Memories that read as empty."""
    compressors: bool = False
    """Whether gzip and xz are run on the same text."""
    device: str = "auto"
    """auto, cpu, or cuda."""
    tokenizer: str | None = None
    """A tokenizer's file or folder for checkpoints that have none; None: each one's own."""
    dtype: str | None = None
    """Format of the weights, as `mm chat --dtype`; None: fp32 on a CPU, bf16 on a GPU."""

    def __post_init__(self) -> None:
        if self.dtype is not None:
            weight_format(self.dtype)
        for name, least in (("context", 1), ("stride", 1), ("max_tokens", 2), ("batch_size", 1), ("longest", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}: choose auto, cpu or cuda")


def evaluate(
    checkpoints: Sequence[str | Path], text: Text, settings: Settings, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure every checkpoint on the same text. Returns plain values: `text`, `settings`, `results` (one for each
    checkpoint, see `measure`), `compressors` where asked for, and `notes`, sentences on what a reader must know.

    Raises MMError for checkpoints, texts or settings that cannot be used.
    """
    device = pick_device(settings.device)
    first = mmcore.load_tokenizer(checkpoints[0], settings.tokenizer)
    part = sample(text, first.encode, settings.max_tokens)
    notes, results, fingerprints = list(text.notes), [], set()
    if part.sha256 != text.sha256:
        notes.append(
            f"{part.bytes:,} of the text's {text.bytes:,} bytes were scored, whole documents drawn by a hash of their "
            f"content: --max-tokens 0 scores all"
        )
    for number, path in enumerate(checkpoints, start=1):
        which = f" ({number} of {len(checkpoints)})" if len(checkpoints) > 1 else ""
        report_progress = progress and (lambda what, done, total, which=which: progress(what + which, done, total))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        if settings.dtype is not None:
            dtype = weight_format(settings.dtype)
        model = mmcore.load_model(path, dtype=dtype, device=str(device), without=settings.without)
        tokenizer = mmcore.load_tokenizer(path, settings.tokenizer)
        tokenizer.check_fits(model.config.vocab_size)
        fingerprints.add(tokenizer.fingerprint)
        found = measure(model, tokenizer, text, part, settings, device, report_progress)
        notes += [f"{path}: {note}" for note in found.pop("notes")]
        results.append({"checkpoint": str(path)} | found)
        del model
    if len(fingerprints) > 1:
        notes.append("the checkpoints have different tokenizers: compare their bits per byte, not their loss a token")
    report = {
        "text": {"name": text.name, "documents": len(part.documents), "bytes": part.bytes, "sha256": part.sha256,
                 "bytes_given": text.bytes},
        "settings": dataclasses.asdict(settings) | {"device": device.type},
        "results": results,
    }
    if settings.compressors:
        report["compressors"] = compressors.compressed_bits_per_byte(part.documents)
    return report | {"notes": notes}


def pick_device(name: str) -> torch.device:
    """The device that auto, cpu or cuda means. Raises HardwareError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise HardwareError("--device cuda: there is no GPU that torch can use here; leave the option out or give cpu")
    return torch.device(name)


def measure(
    model: torch.nn.Module,
    tokenizer: Any,
    text: Text,
    part: Text,
    settings: Settings,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of a model on `part`, and its loss by position on `text`, as plain values.

    `loss` is the mean in nats over all tokens of the documents and their end tokens; `bits_per_byte` divides the same
    sum by the bytes of the text, so that it does not depend on the tokenizer. `notes` are sentences for the reader.
    """
    trained = model.config.max_position_embeddings
    begun = time.perf_counter()
    found: dict[str, Any] = {
        "model_type": model.config.model_type,
        "parameters": accounting.parameters(model.config)["total"],
        "without": sorted(model.knocked_out),
        "trained_context": trained,
        "tokenizer": tokenizer.fingerprint,
    }
    found |= _rolling(model, tokenizer, part, settings, device, progress)
    notes = []
    if found["context"] > trained:
        notes.append(f"a context of {found['context']:,} is longer than the {trained:,} it was trained for")
    longest = position.TIMES_TRAINED * trained if settings.longest is None else settings.longest
    if longest:
        found["by_position"] = _by_position(model, tokenizer, text, longest, settings, device, progress, notes)
    seconds = time.perf_counter() - begun
    return found | {"seconds": seconds, "notes": notes}


def _rolling(
    model: torch.nn.Module, tokenizer: Any, part: Text, settings: Settings, device: torch.device,
    progress: Progress | None,
) -> dict[str, Any]:
    """The rolling score of every token."""
    context = settings.context or model.config.max_position_embeddings
    stride = settings.stride or max(1, context // 2)
    if stride > context:
        raise ConfigError(f"--stride is {stride}, longer than the context of {context}: tokens would be left out")
    batch_size = settings.batch_size or max(1, BATCH_TOKENS // context)
    begin, end = tokenizer.frame()
    framed = []
    for index, ids in enumerate(tokenizer.encode_batch(part.documents)):
        framed.append(np.array([begin, *ids] + ([] if index == part.unfinished else [end]), dtype=np.int64))
    report = progress and (lambda done, total: progress("every token", done, total))
    losses = scoring.score_documents(model, framed, context, stride, batch_size, device, report)
    sums = np.array([values.sum(dtype=np.float64) for values in losses])
    counts = np.array([len(values) for values in losses], dtype=np.float64)
    _require_finite(sums, "the rolling score")
    total, tokens = float(sums.sum()), int(counts.sum())
    mean = total / tokens
    return {
        "loss": mean,
        "standard_error": _clustered_error(sums, counts),
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": total / math.log(2) / part.bytes,
        "tokens": tokens,
        "documents": len(framed),
        "bytes": part.bytes,
        "context": context,
        "stride": stride,
    }


def _by_position(
    model: torch.nn.Module, tokenizer: Any, text: Text, longest: int, settings: Settings, device: torch.device,
    progress: Progress | None, notes: list[str],
) -> dict[str, Any] | None:
    """The loss of sequences read whole, binned by position."""
    most = 10**9 if settings.max_tokens is None else max(1, settings.max_tokens // longest)
    begin, _ = tokenizer.frame()
    sequences = position.cut_sequences(text.documents, tokenizer.encode_batch, begin, longest, most)
    if sequences is None:
        notes.append("the text is too short for a loss by position")
        return None
    if sequences.concatenated:
        notes.append(f"no document is {longest:,} tokens long: for the loss by position documents were joined in order")
    trained = model.config.max_position_embeddings
    if sequences.length < longest:
        notes.append(
            f"the whole text is {sequences.length:,} tokens, so the loss by position ends there, at "
            f"{sequences.length / trained:.2g} times the trained context"
        )
    rows = []
    for index, tokens in enumerate(sequences.tokens):
        rows.append(scoring.score_sequence(model, tokens, device))
        if progress:
            progress("by position", (index + 1) * sequences.length, len(sequences.tokens) * sequences.length)
    losses = np.stack(rows)
    _require_finite(losses, "the loss by position")
    return {
        "longest": sequences.length,
        "sequences": len(rows),
        "concatenated": sequences.concatenated,
        "loss": float(losses.mean(dtype=np.float64)),
        "tokens": losses.size,
        "bins": [dataclasses.asdict(part) for part in position.by_position(losses, trained)],
    }


def _clustered_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Standard error of sum / count with documents as the independent units; None for a single one."""
    if len(sums) < 2:
        return None
    residuals = sums - counts * (sums.sum() / counts.sum())
    factor = len(sums) / (len(sums) - 1)
    return float(np.sqrt(factor * np.square(residuals).sum()) / counts.sum())


def _require_finite(values: np.ndarray, what: str) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise NonFiniteError(
            f"{what} is not finite in {bad} of {values.size} places: the checkpoint holds weights that are not finite "
            f"or overflow in this precision; try an earlier one"
        )

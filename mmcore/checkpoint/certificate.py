"""The proof that two checkpoints are one model: certificate.json.

Every tensor of the result must be the source's, rounded to the result's dtype, bit for bit; and both must compute
the same logits on the same tokens, layer by layer (layerwise.py). Where nothing is rounded the logits must be equal
to the last bit. Where weights are rounded, how much the logits may change depends on the model: a mosaic whose
bandwidths are sharp amplifies a rounded key a hundred times more than a Llama does. So it is measured: the source
is run once more with every weight made larger or smaller, at random, by the largest error that rounding can make,
and the result may differ by twice as much as that (TOLERANCE).

A digest of the result's logits and some of their values are kept, so that it can be checked again without its source.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcore.checkpoint import disk, untrusted
from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.layerwise import Layerwise, Whole, steps_of
from mmcore.checkpoint.names import expected_tensors
from mmcore.checkpoint.tensorfile import WEIGHT_DTYPES, TensorSpec, dtype_name, same_bits
from mmcore.checkpoint.untrusted import shown
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError

NAME = "certificate.json"
TOKENS = 64
SAMPLES = 64

ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Largest relative error of one weight: half the distance between neighbours."""
TOLERANCE = 2.0
"""Times what the disturbed source differs. A weight's rounding is about half of the largest that it can be, so a right
result stays well below: 0.2 to 0.5 of the tolerance, in bf16 and fp16, for random models of every kind with 2 and 8
layers, as initialized and with sharp memories, for stories260K, and for a mosaic and its twin trained on TinyStories.
A model that goes beyond is one that the dtype does not suit."""
AGAIN = 1e-5
"""Share of the largest logit by which logits computed anew may differ from the recorded ones: fp32 sums in another
order, on another machine or with another version. Between this version's own kernels, on trained models: 1e-6."""

Count = Callable[[int], None]
"""Hears of the bytes that were dealt with."""

_PIECE = 32 << 20


@dataclass(frozen=True)
class Certificate:
    """What a conversion did, and how far source and result agree."""

    source: str
    source_format: str
    source_files: dict[str, str]
    """File name -> sha256."""
    result: str
    result_format: str
    """hf, train or torch."""
    result_files: dict[str, str]
    dtype: str
    rounded: bool
    """Whether weights had to be rounded. If not, tensors and logits are equal bit for bit."""
    tensors: int
    """Compared: each is the source's, rounded to `dtype`, bit for bit."""
    tokens: int
    largest_logit: float | None
    """None where logits are not finite."""
    largest_difference: float
    tolerance: float
    """Absolute."""
    logits_sha256: str
    """Of the result's logits in fp32."""
    samples: list[float | None]
    """Some of the result's logits."""
    optimizer: str | None
    """kept or fresh, of a training checkpoint."""
    versions: dict[str, str]
    command: str
    notes: list[str] = field(default_factory=list)


def probe_tokens(config: ModelConfig) -> Tensor:
    """The tokens that both sides read, int64 [1, T]: spread over the vocabulary, the same on every machine.

    64, and for models with long-term memories more by their delay (448 at most), so that those are read.
    """
    count = TOKENS + (0 if config.model_type == "llama" else min(config.long_term_delay, 448))
    return (torch.arange(1, count + 1) * 2_654_435_761 % 2**32 % config.vocab_size)[None]


def is_rounded(specs: Iterable[TensorSpec], dtype: torch.dtype) -> bool:
    """Whether logits can change when weights of `specs` become `dtype`. (fp64 is run in fp32 on both sides.)"""
    return any(spec.dtype != dtype and dtype != torch.float32 for spec in specs)


# -- running both sides ----------------------------------------------------------------------------------------


class Trace:
    """What is kept of a model's logits."""

    def __init__(self, tokens: int, vocab_size: int):
        numbers = torch.arange(SAMPLES)
        self._positions, self._columns = numbers * tokens // SAMPLES, numbers * 2_654_435_761 % 2**32 % vocab_size
        self._values = torch.zeros(SAMPLES)
        self._digest = hashlib.sha256()
        self.largest = 0.0
        self.finite = True

    def add(self, start: int, piece: Tensor) -> None:
        """The logits [T, rows] of the vocabulary's rows from `start` on."""
        self._digest.update(piece.contiguous().numpy().tobytes())
        mine = (self._columns >= start) & (self._columns < start + piece.shape[1])
        self._values[mine] = piece[self._positions[mine], self._columns[mine] - start]
        self.finite = self.finite and bool(torch.isfinite(piece).all())
        self.largest = max(self.largest, float(piece.abs().nan_to_num(0, 0, 0).max()))

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def samples(self) -> list[float | None]:
        return [float(value) if math.isfinite(value) else None for value in self._values]


@dataclass(frozen=True)
class Agreement:
    """How far two models agree."""

    result: Trace
    largest_difference: float
    tolerance: float
    tensors: int


def compare(source: Checkpoint, result: Checkpoint, dtype: torch.dtype, done: Count) -> Agreement:
    """Run both on the probe tokens and compare all their tensors.

    Logits that are not finite must be so on both sides. Raises CheckpointError where a tensor is not the source's
    rounded to `dtype`.
    """
    tokens = probe_tokens(source.config)
    sides = [steps_of(source), steps_of(result)]
    if is_rounded(source.tensors.specs.values(), dtype):
        sides.append(steps_of(source, ROUNDING[dtype]))
    names = list(expected_tensors(result.config))
    xs = [side.embed(tokens) for side in sides]
    for number in range(sides[0].blocks):
        xs = [side.block(number, x) for side, x in zip(sides, xs, strict=True)]
        for name in names:
            if name.startswith(f"model.layers.{number}."):
                _same_tensor(source, result, name, dtype, done)
    for name in names:
        if not (sides[0].blocks and name.startswith("model.layers.")):
            _same_tensor(source, result, name, dtype, done)
    trace, apart = Trace(tokens.shape[1], source.config.vocab_size), [0.0] * len(sides)
    for pieces in zip(*(side.logits(x) for side, x in zip(sides, xs, strict=True)), strict=True):
        (start, before), (_, after) = pieces[:2]
        trace.add(start, after)
        apart = [max(so_far, _apart(before, piece)) for so_far, (_, piece) in zip(apart, pieces, strict=True)]
    return Agreement(trace, apart[1], TOLERANCE * apart[2] if len(apart) > 2 else 0.0, len(names))


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two pieces of logits; what is not finite must be so in both."""
    difference = (a - b).abs()
    difference[~torch.isfinite(a) & ~torch.isfinite(b)] = 0
    return float(difference.nan_to_num(math.inf, math.inf).max())


def _same_tensor(source: Checkpoint, result: Checkpoint, name: str, dtype: torch.dtype, done: Count) -> None:
    require_same(name, source.tensors[name], result.tensors[name], dtype)
    done(result.tensors.specs[name].nbytes)


def require_same(name: str, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    """Raise CheckpointError unless `after` is `before` in `dtype`, bit for bit."""
    if before.shape != after.shape:
        raise CheckpointError(f"the result's {name} is {list(after.shape)} and the source's {list(before.shape)}")
    before, after = before.reshape(-1), after.reshape(-1)
    step = _PIECE // before.dtype.itemsize
    for start in range(0, len(before), step):
        if not same_bits(before[start : start + step].to(dtype), after[start : start + step]):
            raise CheckpointError(f"the result's {name} is not the source's in {dtype_name(dtype)}: nothing was kept")


def trace_of(checkpoint: Checkpoint) -> Trace:
    """The logits of one model on the probe tokens."""
    tokens = probe_tokens(checkpoint.config)
    steps: Layerwise | Whole = steps_of(checkpoint)
    x = steps.embed(tokens)
    for number in range(steps.blocks):
        x = steps.block(number, x)
    trace = Trace(tokens.shape[1], checkpoint.config.vocab_size)
    for start, piece in steps.logits(x):
        trace.add(start, piece)
    return trace


# -- files -----------------------------------------------------------------------------------------------------


def hashes_of(files: Iterable[Path], known: Mapping[str, str], done: Count = lambda count: None) -> dict[str, str]:
    """File name -> sha256; `known` are not read again."""
    hashes = {}
    for file in files:
        if file.name in known:
            hashes[file.name] = known[file.name]
            done(file.stat().st_size)
        else:
            hashes[file.name] = disk.hash_file(file, done).sha256
    return hashes


def to_bytes(certificate: Certificate) -> bytes:
    """certificate.json."""
    return disk.json_bytes(asdict(certificate))


def path_of(result: Path) -> Path:
    """Where the certificate of a result is: in its folder, or beside its file."""
    return result / NAME if result.is_dir() else result.with_name(f"{result.name}.{NAME}")


def read_certificate(path: Path) -> Certificate:
    """A certificate that this program wrote. Raises CheckpointError for anything else."""
    values = untrusted.read_json(path)
    names = {f.name for f in fields(Certificate)}
    if not names <= set(values):
        missing = ", ".join(sorted(names - set(values)))
        raise CheckpointError(f"{path} lacks {missing}: it is damaged or of another version; convert the source again")
    certificate = Certificate(**{name: values[name] for name in names})
    problem = _problem(certificate)
    if problem:
        raise CheckpointError(f"{path} is damaged ({problem}): convert the source again")
    return certificate


_SHA = re.compile(r"[0-9a-f]{64}")


def _problem(certificate: Certificate) -> str | None:
    """What a certificate from a stranger must not be."""
    for name in ("source_files", "result_files"):
        files: Any = getattr(certificate, name)
        if not isinstance(files, dict) or not files:
            return f"{name} are no files"
        for file, sha256 in files.items():
            if not untrusted.is_plain_name(file) or not isinstance(sha256, str) or not _SHA.fullmatch(sha256):
                return f"{name} has the entry {shown(file)}"
    if certificate.dtype not in [dtype_name(dtype) for dtype in WEIGHT_DTYPES]:
        return "its dtype is none"
    numbers = [certificate.largest_difference, certificate.tolerance, certificate.largest_logit or 0.0]
    samples = certificate.samples
    if not isinstance(samples, list) or len(samples) != SAMPLES:
        return f"it has not {SAMPLES} samples"
    for number in [*numbers, *(value for value in samples if value is not None)]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return "a number is none"
    texts = (certificate.source, certificate.result, certificate.dtype, certificate.logits_sha256)
    return None if all(isinstance(text, str) for text in texts) else "a text is none"

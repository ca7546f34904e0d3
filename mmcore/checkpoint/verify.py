"""What a conversion wrote, checked again later: its files, its logits, and its source where that is still there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mmcore.checkpoint import certificate
from mmcore.checkpoint.certificate import AGAIN, Certificate
from mmcore.checkpoint.convert import Meter, Progress, known_hashes, open_streamed, specs_of
from mmcore.checkpoint.formats import Checkpoint
from mmcore.checkpoint.resolve import resolve_checkpoint
from mmcore.errors import CheckpointError, DataError


@dataclass(frozen=True)
class Verification:
    """What `verify_conversion` found; whatever is wrong raises instead."""

    result: str
    certificate: str
    files: int
    """Whose hashes are the recorded ones."""
    logits: str
    """equal: to the last bit; close: within 1e-5 of the largest, as other machines and versions compute them."""
    largest_difference: float
    """Of the recorded logits; 0 where they are equal."""
    source: str
    """compared again, changed since, or not there."""


def verify_conversion(path: str | Path, progress: Progress | None = None) -> Verification:
    """Check a conversion's result again: its files' hashes, its logits, and its source where that is still there.

    Raises CheckpointError where it has no certificate or is no longer what that says, naming all that differs.
    """
    meter = Meter(progress)
    found = resolve_checkpoint(path, verify=False)
    place = certificate.path_of(found)
    if not os.path.lexists(place):
        raise CheckpointError(f"{found} has no {place.name}: only what `mm convert` wrote can be verified")
    known = certificate.read_certificate(place)
    _check_files(found, known, place, meter)
    result = open_streamed(found, allow_nonfinite=True, verify=False)
    meter.begin("computing logits", 0)
    trace = certificate.trace_of(result)
    apart = 0.0 if trace.sha256 == known.logits_sha256 else _apart(trace.samples, known.samples)
    if not apart <= AGAIN * trace.largest:
        raise CheckpointError(
            f"{found} has the files that {place.name} names, but its logits differ from the recorded ones by "
            f"{apart:.3g}: this version of mm computes something else than {known.versions.get('mm')} did"
        )
    logits = "equal" if trace.sha256 == known.logits_sha256 else "close"
    return Verification(str(path), str(place), len(known.result_files), logits, apart, _source_again(known, result, meter))


def _check_files(found: Path, known: Certificate, place: Path, meter: Meter) -> None:
    folder = found if found.is_dir() else found.parent
    there = [folder / name for name in known.result_files if (folder / name).is_file()]
    meter.begin("hashing the result", sum(file.stat().st_size for file in there))
    hashes = certificate.hashes_of(there, {}, meter.add)
    faults = [
        f"{name} {'was altered' if name in hashes else 'is missing'}"
        for name, sha256 in known.result_files.items()
        if hashes.get(name) != sha256
    ]
    if faults:
        raise CheckpointError(f"{found} is not what {place.name} says ({'; '.join(faults)}): convert the source again")


def _apart(now: list[float | None], then: list[float | None]) -> float:
    """The largest difference of two lists of logits; infinite where only one is finite."""
    if any((a is None) != (b is None) for a, b in zip(now, then, strict=True)):
        return float("inf")
    return max((abs(a - b) for a, b in zip(now, then, strict=True) if a is not None), default=0.0)


def _source_again(known: Certificate, result: Checkpoint, meter: Meter) -> str:
    """Compare with the source once more, where it is still as it was. Raises CheckpointError where they differ."""
    try:
        source = open_streamed(known.source, allow_nonfinite=True)
        files = [source.path / name if source.path.is_dir() else source.path for name in known.source_files]
        if certificate.hashes_of(files, known_hashes(source.path)) != known.source_files:
            return "changed since"
    except (CheckpointError, DataError, OSError):
        return "not there"
    dtype = getattr(torch, known.dtype)
    meter.begin("comparing", sum(spec.nbytes for spec in specs_of(result).values()))
    apart = certificate.compare(source, result, dtype, meter.add).largest_difference
    if not apart <= max(known.tolerance, known.largest_difference):
        raise CheckpointError(f"{known.result} differs from its source {known.source} by {apart:.3g}: convert it again")
    return "compared again"

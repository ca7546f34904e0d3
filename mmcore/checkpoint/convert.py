"""From any readable checkpoint to an exported folder, a run to train on, or a file of PyTorch's, with a certificate.

Tensors are read, written and compared one at a time, so the memory needed is that of a few tensors. What was
compared, the hashes of both sides, and the versions stand in the certificate (certificate.py).
"""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mmcore
from mmcore.checkpoint import certificate, hub, manifest, targets, untrusted
from mmcore.checkpoint.certificate import AGAIN, Certificate
from mmcore.checkpoint.formats import Checkpoint, open_checkpoint
from mmcore.checkpoint.formats.base import Reopened
from mmcore.checkpoint.formats.folder import tokenizer_files
from mmcore.checkpoint.load import load_tokenizer
from mmcore.checkpoint.resolve import resolve_checkpoint
from mmcore.checkpoint.resumable import staging_key
from mmcore.checkpoint.tensorfile import LazyTensors, TensorSpec, dtype_name
from mmcore.errors import CheckpointError, ConfigError, DataError

Progress = Callable[[str, int, int], None]
"""Hears of what is being done, the bytes of it that are done, and all of its bytes."""


class _Meter:
    """Adds up the bytes of one thing after another and tells."""

    def __init__(self, tell: Progress | None):
        self._tell, self._what, self._done, self._total = tell, "", 0, 0

    def begin(self, what: str, total: int) -> None:
        self._what, self._done, self._total = what, 0, total
        self.add(0)

    def add(self, count: int) -> None:
        self._done += count
        if self._tell is not None:
            self._tell(self._what, self._done, self._total)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "hf",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
    allow_nonfinite: bool = False,
    command: str = "",
    progress: Progress | None = None,
    tokenizer: str | Path | None = None,
) -> Certificate:
    """Write `source` as `target`: hf, train or torch (targets.py).

    dtype None keeps the source's (fp32 for fp64). tokenizer: goes along in place of the source's own.
    allow_nonfinite converts weights with NaN or infinity as they are.
    Needs memory for a few tensors. Killed or interrupted, the same call goes on from the shards that were finished.
    Raises CheckpointError where the source cannot be read, the target is taken or cannot be written, or the two
    disagree; then nothing is left.
    """
    if to not in targets.TARGETS:
        raise ConfigError(f"--to is {to!r}: choose one of {', '.join(targets.TARGETS)}")
    meter = _Meter(progress)
    checkpoint = _open(source, allow_nonfinite)
    if tokenizer is not None:
        checkpoint = replace(checkpoint, tokenizer_path=Path(tokenizer))
    target = Path(target).absolute()
    _check_apart(checkpoint.path, target)
    dtype = dtype or (torch.float32 if checkpoint.dtype == torch.float64 else checkpoint.dtype)
    targets.check_target(to, target, dtype, force)

    files = _files_read(checkpoint, to)
    before = _stamps(files)
    meter.begin("hashing the source", sum(file.stat().st_size for file in files))
    hashes = certificate.hashes_of(files, _known_hashes(checkpoint.path), meter.add)
    decides = {"source": hashes, "config": checkpoint.config_json, "to": to, "dtype": dtype_name(dtype),
               "shard": max_shard_bytes, "version": mmcore.__version__, "nonfinite": allow_nonfinite}  # fmt: skip
    written = sum(spec.nbytes for spec in _specs(checkpoint).values()) * dtype.itemsize // checkpoint.dtype.itemsize
    made: list[Certificate] = []

    def certify(result: Path) -> bytes:
        if _stamps(files) != before:
            raise CheckpointError(f"{checkpoint.path} was changed while it was converted: convert it again")
        made.append(_certify(checkpoint, hashes, result, target, to, dtype, command, meter, beside.notes))
        return certificate.to_bytes(made[0])

    texts, beside = _tokenizer_files(checkpoint, tokenizer), _Beside({}, {}, [])
    if to == "hf":
        beside = _beside(checkpoint, texts, tokenizer)
    meter.begin("writing", written + (_moments_bytes(checkpoint) if to == "train" else 0))
    targets.TARGETS[to](targets.Job(
        source=checkpoint, target=target, dtype=dtype, max_shard_bytes=max_shard_bytes, force=force,
        allow_nonfinite=allow_nonfinite, key=staging_key(decides), files=texts, extra_files=beside.files,
        extra_config=beside.config, progress=meter.add, certify=certify,
    ))  # fmt: skip
    return made[0]


def _open(path: str | Path, allow_nonfinite: bool, verify: bool = True) -> Checkpoint:
    """A checkpoint whose weights are read with little memory."""
    checkpoint = open_checkpoint(path, verify=verify, allow_nonfinite=allow_nonfinite)

    def reopen() -> LazyTensors:
        return open_checkpoint(checkpoint.path, verify=False, allow_nonfinite=allow_nonfinite).tensors

    return replace(checkpoint, tensors=Reopened(_specs(checkpoint), reopen))


def _specs(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    return checkpoint.tensors.specs


def _check_apart(source: Path, target: Path) -> None:
    """Source and target must not lie in one another, even where the target would be replaced."""
    here, there = source.resolve(), target.resolve()
    if here == there or here.is_relative_to(there):
        raise CheckpointError(f"{target} is the source itself: choose another name for the result")
    if there.is_relative_to(here):
        raise CheckpointError(f"{target} lies in the source {source}: choose another place for the result")


def _files_read(checkpoint: Checkpoint, to: str) -> list[Path]:
    """The files whose content the result depends on."""
    files = list(checkpoint.weight_files)
    if to == "train" and checkpoint.format == "training":
        names = manifest.read_manifest(checkpoint.path)[1]
        files += [checkpoint.path / name for name in names if name.startswith(("optimizer", "trainer", "recipe"))]
    return files


def _stamps(files: list[Path]) -> list[tuple[int, int]]:
    try:
        return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]
    except OSError as error:
        raise CheckpointError(f"{error.filename} has gone while it was converted: convert it again") from error


def _known_hashes(path: Path) -> dict[str, str]:
    """Hashes that opening has just compared: those of a training checkpoint's manifest."""
    if not (path / manifest.NAME).is_file():
        return {}
    return {name: record.sha256 for name, record in manifest.read_manifest(path)[1].items()}


def _moments_bytes(checkpoint: Checkpoint) -> int:
    optimizer = targets.training_parts(checkpoint)[2]
    return sum(spec.nbytes for spec in getattr(optimizer, "specs", {}).values())


def _tokenizer_files(checkpoint: Checkpoint, given: str | Path | None) -> dict[str, bytes | Path]:
    """A folder's files as they are; of the tokenizer that was given, or a llama2.c vocabulary or GPT-2's two files, those
    of the model that is made of it."""
    if given is not None:
        return dict(load_tokenizer(checkpoint.path, given).files())
    if checkpoint.files:
        return dict(checkpoint.files)
    if checkpoint.tokenizer_path is None:
        return {}
    if checkpoint.tokenizer_path.is_dir():
        return dict(tokenizer_files(checkpoint.tokenizer_path))
    return dict(load_tokenizer(checkpoint.path).files())


@dataclass(frozen=True)
class _Beside:
    """What an exported folder holds for transformers beside its weights (hub.py)."""

    config: dict[str, Any]
    """Keys laid over config.json."""
    files: dict[str, bytes | Path]
    notes: list[str]


def _beside(checkpoint: Checkpoint, files: dict[str, bytes | Path], chosen: str | Path | None) -> _Beside:
    """`files` are the tokenizer's, as the source has them; one that only another program can read stays as it is."""
    given = {}
    settings = checkpoint.path / "generation_config.json"
    settings = {settings.name: settings} if checkpoint.path.is_dir() and os.path.lexists(settings) else {}
    for name, file in {**settings, **files}.items():
        if isinstance(file, Path):
            untrusted.require_regular(file)
        given[name] = file if isinstance(file, bytes) else file.read_bytes()
    tokenizer, notes = None, []
    if files and not hub.made_elsewhere(given):
        try:
            tokenizer = load_tokenizer(checkpoint.path, chosen)
        except DataError as error:
            notes.append(f"the tokenizer's files were copied as they are, for {error}")
    values = hub.hub_config({"bos_token_id": None, "eos_token_id": None} | checkpoint.config_json, tokenizer)
    found: dict[str, bytes | Path] = {**hub.hub_files(values, tokenizer, given)}
    if tokenizer is None:
        found = {**files, **found}
    if "tokenizer.model" in found and "tokenizer.json" not in found and tokenizer is not None:
        notes.append("the sentencepiece model has no equal tokenizer.json, so AutoTokenizer cannot read it: only BPE with "
                     "byte fallback and without normalization has one")
    keys = ("auto_map", "bos_token_id", "eos_token_id")
    return _Beside({key: values[key] for key in keys if key in values}, found, notes)


def _certify(source: Checkpoint, hashes: dict[str, str], path: Path, target: Path, to: str, dtype: torch.dtype,
             command: str, meter: _Meter, notes: list[str]) -> Certificate:  # fmt: skip
    """Read the result back, compare, and write down what was found. Raises CheckpointError where the two disagree."""
    result = _open(path, allow_nonfinite=True, verify=False)
    meter.begin("comparing", sum(spec.nbytes for spec in _specs(result).values()))
    agreement = certificate.compare(source, result, dtype, meter.add)
    optimizer = _compare_training(source, path) if to == "train" else None
    trace, rounded = agreement.result, certificate.is_rounded(_specs(source).values(), dtype)
    share = certificate.rounding_share(dtype, source.config.num_hidden_layers) if rounded else 0.0
    if not agreement.largest_difference <= share * trace.largest:
        raise CheckpointError(
            f"the result's logits differ from the source's by {agreement.largest_difference:.3g}, more than "
            f"{share * trace.largest:.3g}: choose another dtype; nothing was written"
        )
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if not file.name.startswith(".")]
    meter.begin("hashing the result", sum(file.stat().st_size for file in files))
    return Certificate(
        source=str(source.path.absolute()),
        source_format=source.format,
        source_files=hashes,
        result=str(target),
        result_format=to,
        result_files=certificate.hashes_of(files, {}, meter.add),
        dtype=dtype_name(dtype),
        rounded=rounded,
        tensors=agreement.tensors,
        tokens=certificate.probe_tokens(source.config).shape[1],
        largest_logit=trace.largest if trace.finite else None,
        largest_difference=agreement.largest_difference,
        tolerance=share * trace.largest,
        logits_sha256=trace.sha256,
        samples=trace.samples,
        optimizer=optimizer,
        versions={"mm": mmcore.__version__, "torch": torch.__version__, "python": platform.python_version()},
        command=command,
        notes=_notes(source, to, optimizer, trace.finite) + notes,
    )


def _compare_training(source: Checkpoint, path: Path) -> str:
    """kept where the result's moments are the source's, bit for bit; fresh where the source has none."""
    before = targets.training_parts(source)[2]
    after = targets.training_parts(open_checkpoint(path, verify=False))[2]
    if set(before) != set(after):
        raise CheckpointError("the result's optimizer has not the source's moments: nothing was kept")
    for name, moment in before.items():
        certificate.require_same(name, moment, after[name], moment.dtype)
    return "kept" if before else "fresh"


def _notes(source: Checkpoint, to: str, optimizer: str | None, finite: bool) -> list[str]:
    """What the user should know about the result."""
    notes = []
    said = source.config_json.get("dtype", source.config_json.get("torch_dtype"))
    if said not in (None, "auto", dtype_name(source.dtype)):
        notes.append(f"the source's config.json says {said}, but its weights are {dtype_name(source.dtype)}, which counts")
    if not finite:
        notes.append("the model's logits are not finite")
    if optimizer == "fresh":
        notes.append("the source has no optimizer: training begins at step 1 with fresh moments")
    if source.tokenizer_path is None and not source.files:
        notes.append("the source has no tokenizer: put one beside the weights to use the result with text")
    return notes


# -- checking again --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """What `verify_conversion` found; whatever is wrong raises instead."""

    result: str
    certificate: str
    files: int
    """Whose hashes are the recorded ones."""
    logits: str
    """equal: to the last bit; close: within 1e-4 of the largest, as other machines and versions compute them."""
    largest_difference: float
    """Of the recorded logits; 0 where they are equal."""
    source: str
    """compared again, changed since, or not there."""


def verify_conversion(path: str | Path, progress: Progress | None = None) -> Verification:
    """Check a conversion's result again: its files' hashes, its logits, and its source where that is still there.

    Raises CheckpointError where it has no certificate or is no longer what that says, naming all that differs.
    """
    meter = _Meter(progress)
    found = resolve_checkpoint(path, verify=False)
    place = certificate.path_of(found)
    if not os.path.lexists(place):
        raise CheckpointError(f"{found} has no {place.name}: only what `mm convert` wrote can be verified")
    known = certificate.read_certificate(place)
    _check_files(found, known, place, meter)
    result = _open(found, allow_nonfinite=True, verify=False)
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


def _check_files(found: Path, known: Certificate, place: Path, meter: _Meter) -> None:
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


def _source_again(known: Certificate, result: Checkpoint, meter: _Meter) -> str:
    """Compare with the source once more, where it is still as it was. Raises CheckpointError where they differ."""
    try:
        source = _open(known.source, allow_nonfinite=True)
        files = [source.path / name if source.path.is_dir() else source.path for name in known.source_files]
        if certificate.hashes_of(files, _known_hashes(source.path)) != known.source_files:
            return "changed since"
    except (CheckpointError, DataError, OSError):
        return "not there"
    dtype = getattr(torch, known.dtype)
    meter.begin("comparing", sum(spec.nbytes for spec in _specs(result).values()))
    apart = certificate.compare(source, result, dtype, meter.add).largest_difference
    if not apart <= max(known.tolerance, known.largest_difference):
        raise CheckpointError(f"{known.result} differs from its source {known.source} by {apart:.3g}: convert it again")
    return "compared again"


def next_command(made: Certificate) -> str:
    """What a user may run next with a result."""
    if made.result_format != "train":
        return shlex.join(["mm", "chat", made.result])
    if made.optimizer == "kept":
        recipe = next(iter(sorted(Path(made.result).glob("checkpoints/*/recipe.yaml"))), "RECIPE")
        return shlex.join(["mm", "pretrain", str(recipe), "--resume", "--set", f"checkpoint.folder={made.result}"])
    return shlex.join(["mm", "pretrain", "RECIPE", "--resume", "--set", f"checkpoint.folder={made.result}"])

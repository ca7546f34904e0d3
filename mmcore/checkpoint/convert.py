"""From any readable checkpoint to an exported folder, a run to train on, or a file of PyTorch's, with a certificate.

Tensors are read, written and compared one at a time, so the memory needed is that of a few tensors. What was
compared, the hashes of both sides, and the versions stand in the certificate (certificate.py).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mmcore
from mmcore.checkpoint import certificate, ends, hub, manifest, targets, untrusted
from mmcore.checkpoint.certificate import Certificate
from mmcore.checkpoint.formats import Checkpoint, open_checkpoint
from mmcore.checkpoint.formats.base import Reopened
from mmcore.checkpoint.formats.folder import tokenizer_files
from mmcore.checkpoint.load import load_tokenizer
from mmcore.checkpoint.resumable import staging_key
from mmcore.checkpoint.tensorfile import LazyTensors, TensorSpec, dtype_name
from mmcore.errors import CheckpointError, ConfigError, DataError

NO_TOKENIZER = "the source has no tokenizer: put one beside the weights to use the result with text"

Progress = Callable[[str, int, int], None]
"""Hears of what is being done, the bytes of it that are done, and all of its bytes."""


class Meter:
    """Adds up the bytes of one thing after another and tells."""

    def __init__(self, tell: Progress | None):
        self._tell, self._what, self._done, self._total = tell, "", 0, 0

    def begin(self, what: str, total: int) -> None:
        """From now on `what` is done, of so many bytes."""
        self._what, self._done, self._total = what, 0, total
        self.add(0)

    def add(self, count: int) -> None:
        """So many bytes more are done."""
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

    dtype None keeps the source's (fp32 for fp64). tokenizer: goes along in place of the source's own, with its begin
    and end tokens.
    allow_nonfinite converts weights with NaN or infinity as they are.
    Needs memory for a few tensors. Killed or interrupted, the same call goes on from the shards that were finished.
    Raises CheckpointError where the source cannot be read, the target is taken or cannot be written, or the two
    disagree; then nothing is left.
    """
    if to not in targets.TARGETS:
        raise ConfigError(f"--to is {to!r}: choose one of {', '.join(targets.TARGETS)}")
    meter = Meter(progress)
    checkpoint, told = open_streamed(source, allow_nonfinite), None
    if tokenizer is not None:
        checkpoint = replace(checkpoint, tokenizer_path=Path(tokenizer))
        checkpoint, told = ends.with_tokenizer(checkpoint, load_tokenizer(checkpoint.path, tokenizer))
    elif to != "hf":  # an exported folder has a generation_config.json of its own
        checkpoint = ends.with_all_ends(checkpoint)
    target = Path(target).absolute()
    _check_apart(checkpoint.path, target)
    dtype = dtype or (torch.float32 if checkpoint.dtype == torch.float64 else checkpoint.dtype)
    targets.check_target(to, target, dtype, force)

    files = _files_read(checkpoint, to)
    before = _stamps(files)
    meter.begin("hashing the source", sum(file.stat().st_size for file in files))
    hashes = certificate.hashes_of(files, known_hashes(checkpoint.path), meter.add)
    decides = {"source": hashes, "config": checkpoint.config_json, "to": to, "dtype": dtype_name(dtype),
               "shard": max_shard_bytes, "version": mmcore.__version__, "nonfinite": allow_nonfinite}  # fmt: skip
    written = sum(spec.nbytes for spec in specs_of(checkpoint).values()) * dtype.itemsize // checkpoint.dtype.itemsize
    made: list[Certificate] = []

    def certify(result: Path) -> bytes:
        if _stamps(files) != before:
            raise CheckpointError(f"{checkpoint.path} was changed while it was converted: convert it again")
        notes = [*filter(None, [told]), *beside.notes]
        made.append(_certify(checkpoint, hashes, result, target, to, dtype, command, meter, notes))
        return certificate.to_bytes(made[0])

    texts, beside = _tokenizer_files(checkpoint, tokenizer), _Beside({}, {}, [])
    if to == "hf":
        beside = _beside(checkpoint, texts, tokenizer, kept_ids=told is None)
    meter.begin("writing", written + (_moments_bytes(checkpoint) if to == "train" else 0))
    targets.TARGETS[to](targets.Job(
        source=checkpoint, target=target, dtype=dtype, max_shard_bytes=max_shard_bytes, force=force,
        allow_nonfinite=allow_nonfinite, key=staging_key(decides), files=texts, extra_files=beside.files,
        extra_config=beside.config, progress=meter.add, certify=certify,
    ))  # fmt: skip
    return made[0]


def open_streamed(path: str | Path, allow_nonfinite: bool, verify: bool = True) -> Checkpoint:
    """A checkpoint whose weights are read with little memory."""
    checkpoint = open_checkpoint(path, verify=verify, allow_nonfinite=allow_nonfinite)

    def reopen() -> LazyTensors:
        return open_checkpoint(checkpoint.path, verify=False, allow_nonfinite=allow_nonfinite).tensors

    return replace(checkpoint, tensors=Reopened(specs_of(checkpoint), reopen))


def specs_of(checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Dtypes and shapes of the weights, which reads none."""
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
        files += [checkpoint.path / name for name in names if name.startswith(("optimizer", "trainer", "recipe", "shards"))]
    return files


def _stamps(files: list[Path]) -> list[tuple[int, int]]:
    try:
        return [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]
    except OSError as error:
        raise CheckpointError(f"{error.filename} has gone while it was converted: convert it again") from error


def known_hashes(path: Path) -> dict[str, str]:
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


def _beside(
    checkpoint: Checkpoint, files: dict[str, bytes | Path], chosen: str | Path | None, kept_ids: bool
) -> _Beside:
    """`files` are the tokenizer's, as the source has them; one that only another program can read stays as it is.
    `kept_ids`: the ids in the source's generation_config.json hold for this tokenizer. Raises CheckpointError."""
    ends.stop_ids(checkpoint)  # what is no token id ends the conversion here
    given = {}
    settings = checkpoint.path / ends.GENERATION
    settings = {settings.name: settings} if checkpoint.path.is_dir() and os.path.lexists(settings) else {}
    for name, file in {**settings, **files}.items():
        if isinstance(file, Path):
            untrusted.require_regular(file)
        given[name] = file if isinstance(file, bytes) else file.read_bytes()
    if not kept_ids:
        values = hub.read_object(given, ends.GENERATION)
        given[ends.GENERATION] = json.dumps({key: values[key] for key in values if not key.endswith("_token_id")}).encode()
    tokenizer, notes = None, []
    if files and not hub.made_elsewhere(given):
        try:
            tokenizer = load_tokenizer(checkpoint.path, chosen)
        except DataError as error:
            notes.append(f"the tokenizer's files were copied as they are, for {error}")
    said = {key: value for key, value in checkpoint.config_json.items() if key != "auto_map"}  # a stranger's code
    values = hub.hub_config({"bos_token_id": None, "eos_token_id": None} | said, tokenizer)
    found: dict[str, bytes | Path] = {**hub.hub_files(values, tokenizer, given, named=chosen is not None)}
    if tokenizer is None:
        found = {**files, **found}
    if "tokenizer.model" in found and "tokenizer.json" not in found and tokenizer is not None:
        notes.append("the sentencepiece model has no equal tokenizer.json, so AutoTokenizer cannot read it: only BPE with "
                     "byte fallback and without normalization has one")
    keys = ("auto_map", "bos_token_id", "eos_token_id")
    return _Beside({key: values[key] for key in keys if key in values}, found, notes)


def _certify(source: Checkpoint, hashes: dict[str, str], path: Path, target: Path, to: str, dtype: torch.dtype,
             command: str, meter: Meter, notes: list[str]) -> Certificate:  # fmt: skip
    """Read the result back, compare, and write down what was found. Raises CheckpointError where the two disagree."""
    result = open_streamed(path, allow_nonfinite=True, verify=False)
    meter.begin("comparing", sum(spec.nbytes for spec in specs_of(result).values()))
    agreement = certificate.compare(source, result, dtype, meter.add)
    optimizer = _compare_training(source, path) if to == "train" else None
    trace, rounded = agreement.result, certificate.is_rounded(specs_of(source).values(), dtype)
    if not agreement.largest_difference <= agreement.tolerance:
        raise CheckpointError(
            f"the result's logits differ from the source's by {agreement.largest_difference:.3g}, more than "
            f"{agreement.tolerance:.3g}: choose another dtype; nothing was written"
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
        tolerance=agreement.tolerance,
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
    kind = {"model_type": source.config.model_type, "gated_keys": source.config.gated_keys}
    if to == "hf" and source.config.model_type != "llama" and not hub.has_classes(kind):
        notes.append("transformers has no class for this kind of model: mm and mmcore.load_model read the result")
    if optimizer == "fresh":
        notes.append("the source has no optimizer: training begins at step 1 with fresh moments")
    if source.tokenizer_path is None and not source.files:
        notes.append(NO_TOKENIZER)
    return notes


def next_command(made: Certificate) -> str:
    """What a user may run next with a result."""
    if made.result_format != "train":
        missing = ["--tokenizer", "FILE"] if NO_TOKENIZER in made.notes else []
        return shlex.join(["mm", "chat", made.result, *missing])
    if made.optimizer == "kept":
        recipe = next(iter(sorted(Path(made.result).glob("checkpoints/*/recipe.yaml"))), "RECIPE")
        return shlex.join(["mm", "pretrain", str(recipe), "--resume", "--set", f"checkpoint.folder={made.result}"])
    return shlex.join(["mm", "pretrain", "RECIPE", "--resume", "--set", f"checkpoint.folder={made.result}"])

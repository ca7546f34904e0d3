"""The file of a saved session: one safetensors file, its facts as JSON in the header, its content hashed.

One file needs one rename to appear whole, and none of it can be code. A flipped bit, a cut, or a session of
another model is refused before anything is taken from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmcore.checkpoint import disk
from mmcore.config.words import expanded
from mmcore.errors import CheckpointError

if TYPE_CHECKING:
    from mmcore.model.language_model import LanguageModel

FORMAT = "mm-session-1"
_SAMPLES = 1024
"""Elements of each weight that go into the fingerprint. One step of training moves every one of them, and
hashing all of a 9.9 B model would take half a minute."""
_KEPT = "the conversation goes on unsaved"


def write_session(path: str | Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `tensors` and `facts` (JSON values) to `path`, readable by its owner only, whole or not at all.

    Raises CheckpointError where the file cannot be written, or exists and is not a saved session.
    """
    path = Path(expanded(path, CheckpointError))
    with disk.writing(path, _KEPT):
        _refuse_others(path)
    text = json.dumps(facts, sort_keys=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": FORMAT, "facts": text, "sha256": _digest(text, tensors)}
    temporary = disk.temporary_name(path)
    try:
        with disk.writing(path, _KEPT):
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            save_file(tensors, temporary, metadata=header)
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            disk.sync_folder(path.parent)
    except SafetensorError as error:  # what its writer makes of a full disk
        raise CheckpointError(f"cannot write {path} ({error}): free some space, or choose another place") from None
    finally:
        with contextlib.suppress(OSError):  # where nothing could be written, there is nothing to remove
            temporary.unlink()


def read_session(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a saved session. Raises CheckpointError for a missing, damaged or foreign file."""
    path = Path(expanded(path, CheckpointError))
    try:
        if not path.is_file():
            raise CheckpointError(f"there is no saved session {path}: check the name")
        if not _is_session(path):
            raise CheckpointError(f"{path} is not a saved session: give a file that /save wrote")
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): load another saved session") from None
    if header.get("sha256") != _digest(header.get("facts", ""), tensors):
        raise CheckpointError(f"{path} was altered or damaged since it was saved: load another saved session")
    facts = json.loads(header["facts"])
    if not isinstance(facts, dict) or not all(isinstance(facts.get(key), dict) for key in ("model", "stats", "extra")):
        raise CheckpointError(f"{path} is not a saved session: give a file that /save wrote")
    return tensors, facts


def identity(model: LanguageModel) -> dict[str, Any]:
    """What a state depends on: the model's settings, weights, number format, and memories knocked out."""
    digest = hashlib.sha256()
    weights = model.state_dict()
    for name, weight in sorted(weights.items()):
        values = weight.flatten()
        step = max(1, values.numel() // _SAMPLES)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values[::step].double().cpu().numpy().tobytes())
    return {
        "settings": json.loads(json.dumps(asdict(model.config))),
        "weights": digest.hexdigest(),
        "dtype": "+".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})),
        "without": sorted(model.knocked_out),
    }


def require_same_model(path: str | Path, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raises CheckpointError, naming what differs, where a session is of another model than `mine`."""
    if saved == mine:
        return
    theirs = saved.get("settings")
    theirs = theirs if isinstance(theirs, dict) else {}
    if theirs != mine["settings"]:
        differ = [key for key, value in mine["settings"].items() if theirs.get(key) != value]
        what = f"another model ({', '.join(differ) or 'more settings'} differ)"
    elif saved.get("without") != mine["without"]:
        what = "other memories knocked out (--without)"
    elif saved.get("dtype") != mine["dtype"]:
        what = f"weights in another number format than {mine['dtype']} (--dtype)"
    else:
        what = "other weights of the same shape"
    raise CheckpointError(f"{path} was saved with {what}: load the checkpoint and options it was saved with")


def _refuse_others(path: Path) -> None:
    """Raise CheckpointError where something else than a saved session has this name, OSError where none can be seen."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file to save the session in")
    if path.exists() and not (path.is_file() and _is_session(path)):  # a pipe would be waited for
        raise CheckpointError(f"{path} exists and is not a saved session: choose another name")


def _is_session(path: Path) -> bool:
    """Whether the header of `path` says that `write_session` wrote it."""
    try:
        with safe_open(path, framework="pt") as handle:
            return (handle.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def _digest(facts: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

"""PyTorch's zip files of tensors (.pt, .pth, .bin): read as data only, and written without pickling anything.

Such a file is a zip whose `data.pkl` describes nested dicts, and whose `data/<n>` are the numbers. Reading goes
through torch.load with weights_only=True, which builds tensors and plain values and runs nothing else, and maps the
numbers from the file; the zip's directory is looked at first. Writing emits the few opcodes (pickle protocol 2) that
dicts, plain values and tensors need, so a file is written tensor by tensor.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.checkpoint import disk, tensorfile, untrusted
from mmcore.checkpoint.disk import FileRecord
from mmcore.checkpoint.formats import opcodes
from mmcore.checkpoint.resumable import Staging
from mmcore.checkpoint.tensorfile import TensorSpec
from mmcore.checkpoint.untrusted import shown
from mmcore.errors import CheckpointError

_ZIP = b"PK\3\4"
_ROOT = "archive"
_ALIGNMENT = 64
_DESCRIPTION_LIMIT = 64 << 20  # data.pkl: some 100 bytes for each tensor
_MEMBER_LIMIT = 1_000_000


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as PyTorch's files do: a zip, or the bare pickle of versions before 1.6.

    A llama2.c file begins with its width as an int32, which below 65,536 looks like neither.
    """
    start = _start(path)
    return start == _ZIP or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5") and start[2:] != b"\0\0")


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


# -- reading ---------------------------------------------------------------------------------------------------


def read_torch_file(path: Path, *, checksums: bool = False) -> Any:
    """What a file holds: nested dicts and lists of plain values and tensors, the tensors mapped from the file.

    Nothing in the file is run. checksums: compare those of all parts first, which reads the file whole. Raises
    CheckpointError for anything else, damage included.
    """
    size = untrusted.require_regular(path)
    members = _members(path, size)
    _check_description(path, checksums)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a stranger's description can fail in any way, all of which mean the same
        if "weights_only" in str(error) or "Unsupported" in str(error) or "WeightsUnpickler" in str(error):
            raise CheckpointError(
                f"{path} holds more than tensors and plain values, which could run code and is never loaded: save only "
                f"the model's state_dict, or use safetensors"
            ) from None
        raise CheckpointError(f"{path} cannot be read as PyTorch's ({shown(_first(error))}): get it again") from None
    _check_storages(path, content, members)
    return content


def _members(path: Path, size: int) -> list[zipfile.ZipInfo]:
    """The zip's directory: stored members, within the file, no name twice. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile meets damage with errors of many kinds
        if not is_torch_file(path):
            raise CheckpointError(f"{path} is no PyTorch file: check the path") from None
        if _start(path) != _ZIP:
            raise CheckpointError(
                f"{path} has the format that PyTorch wrote before 1.6, a bare pickle, which is never read: load and "
                f"save it with a newer PyTorch"
            ) from None
        raise CheckpointError(f"{path} is cut short or damaged ({shown(_first(error))}): get it again") from None
    names = [member.filename for member in members]
    problem = None
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        problem = "is a TorchScript archive, which is code and is never loaded: save the model's state_dict"
    elif len(names) > _MEMBER_LIMIT or len(set(names)) < len(names):
        problem = "is a damaged archive (a name is there twice): get it again"
    elif any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        problem = "is compressed, so that its tensors cannot be mapped: save it with torch.save"
    elif sum(member.file_size for member in members) > size or any(m.file_size != m.compress_size for m in members):
        problem = "is a damaged archive (its parts are larger than the file): get it again"
    elif any(member.file_size > _DESCRIPTION_LIMIT for member in members if member.filename.endswith(".pkl")):
        problem = f"describes its tensors in more than {_DESCRIPTION_LIMIT >> 20} MiB: it is not what its name says"
    elif sum(name.endswith("/data.pkl") for name in names) != 1:
        problem = "is a zip, but none of PyTorch's: check the path"
    if problem:
        raise CheckpointError(f"{path} {problem}")
    return members


def _check_description(path: Path, checksums: bool) -> None:
    """Nothing but tensors and plain values in data.pkl, and the checksums of all parts where wanted."""
    try:
        with zipfile.ZipFile(path) as archive:
            altered = archive.testzip() if checksums else None
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            order = name.removesuffix("data.pkl") + "byteorder"
            big = order in archive.namelist() and archive.getinfo(order).file_size < 64 and archive.read(order) == b"big"
            found = opcodes.foreign(archive.read(name))
    except Exception as error:  # as above
        raise CheckpointError(f"{path} is cut short or damaged ({shown(_first(error))}): get it again") from None
    if altered:
        raise CheckpointError(f"{path} is damaged: {shown(altered)} was altered; get it again")
    if big:
        raise CheckpointError(f"{path} was written by a big-endian machine: save it again on a little-endian one")
    if found:
        raise CheckpointError(
            f"{path} holds more than tensors and plain values ({shown(found)}), which could run code and is never loaded: "
            f"save only the model's state_dict, or use safetensors"
        )


def plain_dict(value: Any) -> dict[Any, Any] | None:
    """A dict that was read from a file, as one whose methods are dict's own; None for anything else.

    A file can give an OrderedDict attributes that hide its methods."""
    return {key: item for key, item in dict.items(value)} if isinstance(value, dict) else None


def tensor_problem(tensor: Tensor, file_bytes: int) -> str | None:
    """Why a tensor that was read from a file is not one to load, or None."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return "is no dense tensor"
    if tensor.numel() * tensor.element_size() > min(file_bytes, tensor.untyped_storage().nbytes()):
        return "claims more numbers than the file holds"
    return None


def _check_storages(path: Path, content: Any, members: list[zipfile.ZipInfo]) -> None:
    """Every storage must be a whole member of the zip: torch takes what follows where a member is too short.

    Torch does not say which member a storage is, but all are views of one mapping, which begins at a whole page.
    """
    storages = sorted({(storage.data_ptr(), storage.nbytes()) for storage in _storages(content) if storage.nbytes()})
    if not storages:
        return
    places = _places(path, members)
    first, size = storages[0]
    bases = (first - offset for offset, length in places.items() if length == size and (first - offset) % 4096 == 0)
    if not any(all(places.get(start - base) == length for start, length in storages) for base in bases):
        raise CheckpointError(f"{path} is damaged: its tensors and its parts differ in size; get it again")


def _places(path: Path, members: list[zipfile.ZipInfo]) -> dict[int, int]:
    """Where each member's data begins in the file -> its bytes."""
    places = {}
    with open(path, "rb") as file:
        for member in members:
            file.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4).ljust(4, b"\0"))
            places[member.header_offset + 30 + name + extra] = member.file_size
    return places


def _storages(content: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of all plain tensors in nested dicts and lists, which may hold themselves."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (Mapping, list, tuple, set)):
            if id(value) not in seen:
                seen.add(id(value))
                waiting.extend(value.values() if isinstance(value, Mapping) else value)
        elif type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta:
            yield value.untyped_storage()


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# -- writing ---------------------------------------------------------------------------------------------------


def write_torch_file(
    path: Path,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    specs: Mapping[str, TensorSpec],
    *,
    aliases: Mapping[str, str] | None = None,
    staging: Staging | None = None,
    allow_nonfinite: bool = False,
) -> FileRecord:
    """Write `{**values, "model": {name: tensor}}` so that torch.load(path, weights_only=True, mmap=True) reads it.

    values: nested dicts and lists of plain values and bytes, the last as uint8 tensors. aliases: further names in
    "model" for tensors that are there already, as a tied classifier's. Tensors are fetched one at a time, in order.
    Raises OSError, and CheckpointError as write_tensors does.
    """
    blobs: dict[str, bytes] = {}
    stored = {name: _Stored(str(number), spec) for number, (name, spec) in enumerate(specs.items())}
    model = stored | {alias: stored[name] for alias, name in (aliases or {}).items()}
    content = {**_with_blobs(values, blobs, len(stored)), "model": model}
    with open(path, "xb") as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, "data.pkl", b"\x80\x02" + b"".join(_opcodes(content)) + b".")
            _add(archive, "byteorder", b"little")
            for name, reference in stored.items():
                data = tensorfile.bytes_of(name, tensors[name], reference.spec, allow_nonfinite)
                _add(archive, f"data/{reference.key}", data)
                if staging is not None:
                    staging.progress(len(data))
            for key, data in blobs.items():
                _add(archive, f"data/{key}", data)
            _add(archive, "version", b"3\n")
        out.flush()
        os.fsync(out.fileno())
    return disk.hash_file(path)


class _Stored:
    """A tensor as its description refers to it: by the number of its storage."""

    def __init__(self, key: str, spec: TensorSpec):
        self.key, self.spec = key, spec


def _with_blobs(value: Any, blobs: dict[str, bytes], first: int) -> Any:
    """`value` with bytes replaced by references to storages, numbered from `first` and put into `blobs`."""
    if isinstance(value, Mapping):
        return {key: _with_blobs(item, blobs, first) for key, item in value.items()}
    if not isinstance(value, bytes):
        return value
    key = str(first + len(blobs))
    blobs[key] = value
    return _Stored(key, TensorSpec(torch.uint8, (len(value),)))


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """A member whose data begins at a multiple of 64 bytes, as mapped tensors need."""
    entry = zipfile.ZipInfo(f"{_ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
    entry.file_size = len(data)
    large = len(data) > zipfile.ZIP64_LIMIT // 2
    begins = archive.fp.tell() + 30 + len(entry.filename) + (20 if large else 0) + 4
    padding = -begins % _ALIGNMENT
    entry.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", the field that PyTorch uses
    with archive.open(entry, "w", force_zip64=large) as member:
        for start in range(0, len(data), disk.CHUNK):
            member.write(data[start : start + disk.CHUNK])


_STORAGES = {
    torch.float64: "DoubleStorage", torch.float32: "FloatStorage", torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage", torch.uint8: "ByteStorage",
}  # fmt: skip


def _opcodes(value: Any) -> Iterator[bytes]:
    """Protocol 2's opcodes that build `value`."""
    if isinstance(value, _Stored):
        yield from _tensor_opcodes(value)
    elif isinstance(value, Mapping):
        yield b"}("
        for key, item in value.items():
            yield from _opcodes(key)
            yield from _opcodes(item)
        yield b"u"
    elif isinstance(value, (list, tuple)):
        yield b"](" if isinstance(value, list) else b"("
        for item in value:
            yield from _opcodes(item)
        yield b"e" if isinstance(value, list) else b"t"
    elif value is None or isinstance(value, bool):
        yield {None: b"N", True: b"\x88", False: b"\x89"}[value]
    elif isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        yield b"\x8a" + bytes([len(data)]) + data
    elif isinstance(value, float):
        yield b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        data = value.encode()
        yield b"X" + struct.pack("<I", len(data)) + data
    else:
        raise TypeError(f"{type(value).__name__} has no place in a file of tensors")


def _tensor_opcodes(reference: _Stored) -> Iterator[bytes]:
    """_rebuild_tensor_v2(storage, offset, sizes, strides, requires_grad, hooks)."""
    shape, count = reference.spec.shape, 1
    strides = []
    for size in reversed(shape):
        strides.append(count)
        count *= size
    yield b"ctorch._utils\n_rebuild_tensor_v2\n((" + b"".join(_opcodes("storage"))
    yield f"ctorch\n{_STORAGES[reference.spec.dtype]}\n".encode()
    for part in (reference.key, "cpu", count):
        yield from _opcodes(part)
    yield b"tQ"
    for part in (0, shape, tuple(reversed(strides)), False):
        yield from _opcodes(part)
    yield b"ccollections\nOrderedDict\n)RtR"

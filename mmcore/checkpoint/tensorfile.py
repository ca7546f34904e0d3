"""safetensors files: headers read with distrust, shards written tensor by tensor.

The header is parsed here before the library opens the file, because the library accepts a name given twice, and
because names and shapes are compared with the configuration before anything is allocated. Writing streams:
all offsets follow from names, shapes and dtypes, so a shard needs the memory of one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmcore.checkpoint import disk, untrusted
from mmcore.checkpoint.disk import FileRecord, NewFile
from mmcore.checkpoint.resumable import Staging
from mmcore.checkpoint.untrusted import shown
from mmcore.errors import CheckpointError

SHARD_BYTES = 4_000_000_000
"""Largest file of tensors in a training checkpoint; a tensor above it has a file of its own."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_EXPONENTS = {
    torch.float64: (np.uint64, np.uint64(0x7FF << 52)),
    torch.float32: (np.uint32, np.uint32(0xFF << 23)),
    torch.bfloat16: (np.uint16, np.uint16(0xFF << 7)),
    torch.float16: (np.uint16, np.uint16(0x1F << 10)),
}
"""dtype -> a word of its size, and the bits of its exponent."""
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What weights may be, the widest first."""

_PIECE = 1 << 16
_HEADER_LIMIT = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its numbers."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read when they are asked for. NaN and infinity are refused unless allowed."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]], specs: Mapping[str, TensorSpec], origin: Path,
                 allow_nonfinite: bool = False, twins: Mapping[str, str] | None = None,
                 hold: object = None):  # fmt: skip
        """twins: name -> another name in `readers` whose tensor must be the same; the other is not part of the mapping.
        hold: whatever keeps the files there, let go with this mapping."""
        self._readers, self.specs, self.origin, self._allow_nonfinite = readers, specs, origin, allow_nonfinite
        self._twins, self._hold = dict(twins or {}), hold

    def __getitem__(self, name: str) -> Tensor:
        return self._checked(name, lambda reader: reader())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop-1 of a tensor; of a safetensors file only those are read."""
        return self._checked(
            name, lambda reader: reader.rows(start, stop) if isinstance(reader, Stored) else reader()[start:stop]
        )

    def _checked(self, name: str, read: Callable[[Callable[[], Tensor]], Tensor]) -> Tensor:
        tensor = read(self._readers[name])
        if name in self._twins and not same_bits(tensor, read(self._readers[self._twins[name]])):
            raise CheckpointError(
                f"{self.origin}: its config.json ties {self._twins[name]} to {name}, but the two differ: correct "
                f"tie_word_embeddings"
            )
        if not self._allow_nonfinite and not is_finite(tensor):
            raise CheckpointError(
                f"{self.origin}: tensor {shown(name)} holds NaN or infinity: go back to an earlier checkpoint, or "
                f"convert it as it is with --allow-nan"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal bit for bit (NaN equals itself, and -0 is not 0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(word), b.contiguous().view(word))


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite: whether no exponent has all its bits set.

    By numpy in pieces that stay in the cache: 8 GB/s on one thread, eight times what the hash reads. torch.aminmax
    is no slower on an idle machine, but its two threads waited 6 ms for each other per 1 MB matrix on a busy one.
    """
    if tensor.numel() == 0 or not tensor.dtype.is_floating_point:
        return True
    tensor = tensor.detach().cpu()
    if tensor.dtype not in _EXPONENTS:
        tensor = tensor.float()  # 8-bit floats
    word, mask = _EXPONENTS[tensor.dtype]
    bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().view(word)
    pieces = (bits[start : start + _PIECE] for start in range(0, len(bits), _PIECE))
    return all((piece & mask).max() != mask for piece in pieces)


# -- reading ---------------------------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes in a safetensors file, all of the format's rules checked.

    Raises CheckpointError for a link, a file cut short, unreadable or unreasonable headers, duplicate names,
    overlaps and holes.
    """
    size = untrusted.require_regular(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(f"{path} is cut short or is no safetensors file: get it again")
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = untrusted.parse_json_object(data)
        header.pop("__metadata__", None)
        return _specs_of(header, size - 8 - length)
    except ValueError as error:
        raise CheckpointError(f"{path} has a damaged header ({error}): get it again") from error


def _specs_of(header: dict[str, Any], data_bytes: int) -> dict[str, TensorSpec]:
    specs, spans = {}, []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{shown(name)} is not described as a tensor")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{shown(name)} has the unknown dtype {shown(str(dtype))}")
        if not are_sizes(shape) or not are_sizes(span) or len(span) != 2 or len(shape) > 8:
            raise ValueError(f"{shown(name)} has a wrong shape or place")
        spec = TensorSpec(DTYPES[dtype], tuple(shape))
        if span[1] - span[0] != spec.nbytes:
            raise ValueError(f"{shown(name)} does not fill its place")
        specs[name] = spec
        spans.append((span[0], span[1]))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("tensors overlap or leave holes")
        end = stop
    if end != data_bytes:
        raise ValueError(f"it describes {end} bytes of tensors and the file holds {data_bytes}")
    return specs


def are_sizes(values: Any) -> bool:
    """Whether `values` is a list of whole numbers that can be sizes or places."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


@dataclass(frozen=True)
class Piece:
    """Rows start .. stop-1 of a tensor, which a file holds under the tensor's name."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder, as its headers tell: where each lies, and which names appear more than once."""

    specs: dict[str, TensorSpec]
    places: dict[str, Path]
    """Of the tensors that lie in one file whole."""
    problems: list[str]
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    """Of the tensors that are cut into rows, in the order of the rows."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold tensors."""
        return tuple(sorted({*self.places.values(), *(piece.path for cut in self.pieces.values() for piece in cut)}))


def find_tensors(folder: Path, stem: str, listed: Container[str] | None = None) -> TensorFiles:
    """Read the headers of `<stem>.safetensors`, or of the shards that `<stem>.safetensors.index.json` names.

    listed: the only files that count, where a manifest says which. Raises CheckpointError where a file is missing
    or damaged, or the index names anything but plain files of the folder. Contradictions between index and shards
    are returned as problems, so that all can be reported.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    there = [path for path in (single, index) if os.path.lexists(path) and (listed is None or path.name in listed)]
    if len(there) == 2:
        raise CheckpointError(f"{folder} has both {single.name} and {index.name}: remove the one that is stale")
    if index not in there:
        specs = read_header(single)
        return TensorFiles(specs, dict.fromkeys(specs, single), [])
    weight_map = untrusted.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: get it again")
    for name, file in weight_map.items():
        if not untrusted.is_plain_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} keeps {shown(name)} in {shown(str(file))}: a shard must be a plain file name in that folder"
            )
    found = TensorFiles({}, {}, [])
    for file in sorted(set(weight_map.values())):
        for name, spec in read_header(folder / file).items():
            if name in found.specs:
                found.problems.append(f"{shown(name)} is in {found.places[name].name} and again in {file}")
            elif weight_map.get(name) != file:
                found.problems.append(f"{shown(name)} is in {file} but not so in the index")
            found.specs.setdefault(name, spec)
            found.places.setdefault(name, folder / file)
    return found


def lazy_tensors(files: TensorFiles, names: list[str], origin: Path, allow_nonfinite: bool = False,
                 twins: Mapping[str, str] | None = None, hold: object = None) -> LazyTensors:  # fmt: skip
    """The named tensors of a folder, mapped from disk when they are asked for; twins and hold: see LazyTensors."""
    handles: dict[Path, Any] = {}
    readers = {
        name: Stored(handles, files.places.get(name), files.pieces.get(name, ()), name, files.specs[name])
        for name in [*names, *(twins or {}).values()]
    }
    return LazyTensors(readers, {name: files.specs[name] for name in names}, origin, allow_nonfinite, twins, hold)


@dataclass(frozen=True)
class Stored:
    """A tensor in safetensors: whole in `place`, whose header was read before, or in `pieces`."""

    handles: dict[Path, Any]
    """Open files, shared by the tensors of a folder."""
    place: Path | None
    pieces: tuple[Piece, ...]
    name: str
    spec: TensorSpec

    def __call__(self) -> Tensor:
        if self.place is None:
            return self.rows(0, self.spec.shape[0] if self.spec.shape else 1)
        return self._take(self.place, self.spec.shape, lambda file: file.get_tensor(self.name))

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop-1, each piece read once and no further than needed."""
        if not self.spec.shape:
            return self() if self.place else self._slice(self.pieces[0].path, (), slice(None))
        if self.place is not None:
            return self._slice(self.place, self.spec.shape, slice(start, stop))
        parts = []
        for piece in self.pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                shape = (piece.stop - piece.start, *self.spec.shape[1:])
                parts.append(self._slice(piece.path, shape, slice(first - piece.start, last - piece.start)))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0, *self.spec.shape[1:], dtype=self.spec.dtype)

    def _slice(self, path: Path, shape: tuple[int, ...], rows: slice) -> Tensor:
        if not shape or 0 in shape or (rows.start == 0 and rows.stop == shape[0]):
            return self._take(path, shape, lambda file: file.get_tensor(self.name))[rows if shape else ...]
        return self._take(path, shape, lambda file: file.get_slice(self.name)[rows], len(range(*rows.indices(shape[0]))))

    def _take(self, path: Path, shape: tuple[int, ...], read: Callable[[Any], Tensor], rows: int | None = None) -> Tensor:
        """What `read` finds in a file where the tensor must have `shape`; `rows` of it, or all."""
        try:
            if path not in self.handles:
                if self.place is None and self.name not in read_header(path):
                    raise CheckpointError(f"{path} has no {shown(self.name)}: go back to an earlier checkpoint")
                self.handles[path] = safe_open(path, framework="pt", device="cpu")
            there = tuple(self.handles[path].get_slice(self.name).get_shape())
            tensor = read(self.handles[path]) if there == shape else None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {shown(self.name)} from {path}: {shown(str(error))}") from error
        wanted = shape if rows is None else (rows, *shape[1:])
        if tensor is None or tensor.dtype != self.spec.dtype or tuple(tensor.shape) != wanted:
            raise CheckpointError(f"{path} changed while it was read: {shown(self.name)} is no longer {list(shape)}")
        return tensor


# -- writing ---------------------------------------------------------------------------------------------------


def plan_shards(specs: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    """The names, in order, cut into files of at most `limit` bytes of tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


def write_tensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    specs: Mapping[str, TensorSpec],
    limit: int | None = SHARD_BYTES,
    *,
    staging: Staging | None = None,
    allow_nonfinite: bool = False,
) -> dict[str, FileRecord]:
    """Write tensors as `<stem>.safetensors`, or as shards and an index where they exceed `limit` bytes
    (None: one file whatever its size).

    Each tensor is fetched from the mapping once, converted to its spec's dtype, checked, written and dropped.
    staging: what an earlier attempt finished is kept, and told of each file that is finished now.
    Returns the records of the files, all of which are on the disk. Raises OSError, and CheckpointError for a
    tensor that is not finite (unless allowed) or no longer so in the dtype asked for, or has another shape than its
    spec.
    """
    shards = [list(specs)] if limit is None else plan_shards(specs, limit)
    files = [f"{stem}.safetensors"]
    if len(shards) > 1:
        files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    records = {}
    for file, names in zip(files, shards, strict=True):
        kept = staging.finished(folder / file) if staging is not None else None
        chosen = {name: specs[name] for name in names}
        records[file] = kept or _write_shard(folder / file, tensors, chosen, staging, allow_nonfinite)
        if kept is not None:
            staging.progress(sum(spec.nbytes for spec in chosen.values()))
        elif staging is not None:
            staging.finish(folder / file, records[file])
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = f"{stem}.safetensors.index.json"
        values = {"metadata": {"total_size": total}, "weight_map": weight_map}
        records[index] = disk.write_json(folder / index, values)
    return records


def _write_shard(path: Path, tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], staging: Staging | None,
                 allow_nonfinite: bool) -> FileRecord:  # fmt: skip
    # wider dtypes first: every tensor then starts at a multiple of its element size, as mapping needs
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)
    with NewFile(path) as out:
        out.write(_header({name: specs[name] for name in names}))
        for name in names:
            out.write(bytes_of(name, tensors[name], specs[name], allow_nonfinite))
            if staging is not None:
                staging.progress(specs[name].nbytes)
        return out.close()


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers 4 asks for this word
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.nbytes
        entries[name] = {"dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    data = json.dumps(entries, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def bytes_of(name: str, tensor: Tensor, spec: TensorSpec, allow_nonfinite: bool = False) -> memoryview:
    """The bytes of a tensor in its spec's dtype. Raises CheckpointError for another shape, and for NaN or infinity.

    With allow_nonfinite only what conversion itself makes infinite is refused.
    """
    if tuple(tensor.shape) != spec.shape:
        raise CheckpointError(f"tensor {name} is {list(tensor.shape)} and not {list(spec.shape)}: nothing was saved")
    given = tensor.detach()
    tensor = given.to("cpu", spec.dtype).contiguous()
    if not is_finite(tensor):
        if is_finite(given) or not torch.equal(torch.isfinite(given).cpu(), torch.isfinite(tensor)):
            raise CheckpointError(
                f"tensor {name} overflows in {dtype_name(spec.dtype)}: choose bfloat16 or float32; nothing was saved"
            )
        if not allow_nonfinite:
            raise CheckpointError(
                f"tensor {name} holds NaN or infinity and is never saved: go back to the last checkpoint with a lower "
                f"learning rate"
            )
    if tensor.numel() == 0:
        return memoryview(b"")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16 ...: the word config.json uses."""
    return str(dtype).removeprefix("torch.")

"""shards.json: which rows of which tensor lie in which file of a checkpoint that several ranks wrote.

Rank r of N writes its rows as model-rank0000r-of-0000N.safetensors and optimizer-rank0000r-of-0000N.safetensors,
each piece under the name of its tensor. shards.json says for every tensor

    {"shape": [V, d], "dtype": "float32", "pieces": [{"file": ..., "start": 0, "stop": 129}, ...]}

It is read with distrust: files are plain names that the manifest lists, all of one number of ranks, and the pieces
of a tensor fill its first dimension without overlap or hole. A checkpoint of one rank has no shards.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmcore.checkpoint import tensorfile, untrusted
from mmcore.checkpoint.tensorfile import DTYPES, Piece, TensorFiles, TensorSpec, dtype_name
from mmcore.checkpoint.untrusted import shown
from mmcore.errors import CheckpointError

NAME = "shards.json"
FORMAT = "memory-mosaics-sharded-tensors"
SECTIONS = ("model", "optimizer")

Pieces = Mapping[str, Mapping[str, tuple[int, int]]]
"""Section -> tensor -> the rows of it that one rank wrote."""

_FILE = re.compile(r"(model|optimizer)-rank(\d{5})-of-(\d{5})\.safetensors")
_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
_LIMIT = 1 << 30  # 8 B parameters over 512 ranks are a million pieces
_LISTED = 2  # faults in a message; more are counted


def stem(section: str, rank: int, size: int) -> str:
    """The name of a rank's file, without its ending; ranks are counted from 1 there, as shards are."""
    return section if size == 1 else f"{section}-rank{rank + 1:05d}-of-{size:05d}"


def index_bytes(specs: Mapping[str, Mapping[str, TensorSpec]], pieces: Iterable[Pieces]) -> bytes:
    """shards.json, from the whole tensors of each section and what each rank wrote, in the order of the ranks.

    Raises CheckpointError where the ranks' rows do not make up a tensor: nothing is published that cannot be read.
    """
    ranks = list(pieces)
    values: dict[str, Any] = {"format": FORMAT, "ranks": len(ranks)}
    for section in SECTIONS:
        entries = {
            name: {"shape": list(spec.shape), "dtype": dtype_name(spec.dtype), "pieces": []}
            for name, spec in specs[section].items()
        }
        for rank, written in enumerate(ranks):
            file = f"{stem(section, rank, len(ranks))}.safetensors"
            for name, (start, stop) in written[section].items():
                entries[name]["pieces"].append({"file": file, "start": start, "stop": stop})
        for name, entry in entries.items():
            entry["pieces"].sort(key=lambda piece: piece["start"])
            edges = [0] + [edge for piece in entry["pieces"] for edge in (piece["start"], piece["stop"])]
            if edges[0:-1:2] != edges[1::2] or edges[-1] != _rows(specs[section][name]):
                raise CheckpointError(f"the ranks' rows of {name} do not make it up (edges {edges}): nothing was saved")
        values[section] = entries
    return (json.dumps(values, separators=(",", ":")) + "\n").encode()


def find_pieces(folder: Path, section: str, listed: Container[str]) -> TensorFiles:
    """The tensors of a section (model, optimizer) of a sharded checkpoint. Only shards.json is read.

    listed: the files that the manifest names. Raises CheckpointError with the first faults of shards.json.
    """
    path = folder / NAME
    values = untrusted.read_json(path, _LIMIT)
    ranks, entries = values.get("ranks"), values.get(section)
    if values.get("format") != FORMAT or type(ranks) is not int or ranks < 1 or not isinstance(entries, dict):
        raise CheckpointError(f"{path} does not describe the shards of a checkpoint: go back to an earlier checkpoint")
    found, faults = TensorFiles({}, {}, []), []
    for name, entry in entries.items():
        try:
            found.specs[name], found.pieces[name] = _tensor(folder, section, ranks, entry, listed)
        except ValueError as error:
            faults.append(f"{shown(name)} {error}")
    if faults:
        more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise CheckpointError(
            f"{path} does not fit its files ({'; '.join(faults[:_LISTED])}{more}): go back to an earlier checkpoint"
        )
    return found


def _tensor(folder: Path, section: str, ranks: int, entry: Any,
            listed: Container[str]) -> tuple[TensorSpec, tuple[Piece, ...]]:  # fmt: skip
    """Raises ValueError, whose text goes on after the tensor's name."""
    if not isinstance(entry, dict) or set(entry) != {"shape", "dtype", "pieces"}:
        raise ValueError("is not described as a tensor")
    shape, dtype, pieces = entry["shape"], entry["dtype"], entry["pieces"]
    if not isinstance(dtype, str) or dtype not in _DTYPES or not tensorfile.are_sizes(shape) or len(shape) > 8:
        raise ValueError("has a wrong shape or dtype")
    if not isinstance(pieces, list) or not pieces:
        raise ValueError("has no pieces")
    cut = tuple(_piece(folder, section, ranks, piece, listed) for piece in pieces)
    end = 0
    for piece in cut:
        if piece.start != end:
            raise ValueError(f"has pieces that {'overlap' if piece.start < end else 'leave a hole'} at row {end}")
        end = piece.stop
    spec = TensorSpec(_DTYPES[dtype], tuple(shape))
    if end != _rows(spec):
        raise ValueError(f"has pieces of {end} rows and must have {_rows(spec)}")
    return spec, cut


def _rows(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape else 1


def _piece(folder: Path, section: str, ranks: int, piece: Any, listed: Container[str]) -> Piece:
    if not isinstance(piece, dict) or set(piece) != {"file", "start", "stop"}:
        raise ValueError("has a piece that names no file and rows")
    file, start, stop = piece["file"], piece["start"], piece["stop"]
    match = _FILE.fullmatch(file) if isinstance(file, str) else None
    if match is None or match[1] != section:
        raise ValueError(f"lies in {shown(str(file))}, which is no file of this checkpoint's {section}")
    if int(match[3]) != ranks or not 1 <= int(match[2]) <= ranks:
        raise ValueError(f"lies in {file}, and the checkpoint is of {ranks} ranks")
    if file not in listed:
        raise ValueError(f"lies in {file}, which the manifest does not name")
    if not tensorfile.are_sizes([start, stop]) or start >= stop:
        raise ValueError(f"has a piece of the rows {shown(str(start))} to {shown(str(stop))}")
    return Piece(folder / file, start, stop)


def file_faults(files: TensorFiles, part: Iterable[Path]) -> list[str]:
    """What is wrong with the headers of the files in `part`: each must hold the pieces it has, and nothing else."""
    pieces: dict[Path, dict[str, TensorSpec]] = {path: {} for path in part}
    for name, cut in files.pieces.items():
        spec = files.specs[name]
        for piece in cut:
            if piece.path in pieces:
                shape = (piece.stop - piece.start, *spec.shape[1:]) if spec.shape else ()
                pieces[piece.path][name] = TensorSpec(spec.dtype, shape)
    faults = []
    for path, expected in pieces.items():
        there = tensorfile.read_header(path)
        if there != expected:
            name = next(name for name in [*expected, *there] if expected.get(name) != there.get(name))
            faults.append(f"{path.name} and {NAME} say different things of {shown(name)}")
    return faults

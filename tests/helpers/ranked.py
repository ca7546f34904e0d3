"""A training checkpoint as any number of ranks writes it, from one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mmcore.checkpoint import disk, manifest, sharded
from mmcore.checkpoint.tensorfile import TensorSpec, write_tensors


def write_ranked(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], ranks: int,
                 texts: Mapping[str, bytes]) -> Path:  # fmt: skip
    """Write `folder` with the rows of each tensor spread over the files of `ranks` ranks, as evenly as they go.

    tensors: model and optimizer, each name -> tensor; a tensor is fetched once a rank, and dropped. texts: the other
    files (config.json, trainer.json, ...).
    """
    folder.mkdir(parents=True)
    records = {name: disk.write_file(folder / name, [content]) for name, content in texts.items()}
    specs = {part: {name: _spec(found, name) for name in found} for part, found in tensors.items()}
    pieces = []
    for rank in range(ranks):
        rows = {part: {name: _share(spec.shape[0], rank, ranks) for name, spec in found.items()} for part, found in specs.items()}
        rows = {part: {name: share for name, share in found.items() if share[0] < share[1]} for part, found in rows.items()}
        pieces.append(rows)
        for part, shares in rows.items():
            mine = {name: TensorSpec(specs[part][name].dtype, (stop - start, *specs[part][name].shape[1:]))
                    for name, (start, stop) in shares.items()}  # fmt: skip
            records |= write_tensors(folder, sharded.stem(part, rank, ranks), _Rows(tensors[part], shares), mine, None)
    records[sharded.NAME] = disk.write_file(folder / sharded.NAME, [sharded.index_bytes(specs, pieces)])
    manifest.write_manifest(folder, step, records)
    return folder


class _Rows(dict):
    """Name -> the rows of a tensor, cut when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], shares: Mapping[str, tuple[int, int]]):
        super().__init__(shares)
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name][slice(*super().__getitem__(name))]


def _spec(tensors: Mapping[str, Tensor], name: str) -> TensorSpec:
    specs = getattr(tensors, "specs", None)
    return specs[name] if specs else TensorSpec(tensors[name].dtype, tuple(tensors[name].shape))


def _share(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """The rows of one rank: start and end."""
    return rank * rows // ranks, (rank + 1) * rows // ranks

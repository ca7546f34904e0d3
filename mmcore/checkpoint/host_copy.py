"""This rank's rows of the weights and moments, copied aside so that training can go on while they are written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmcore.checkpoint.rows import Rows


class HostCopy:
    """Host memory for one copy of this rank's rows, kept from save to save: fresh pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, sections: Mapping[str, Mapping[str, Rows]]) -> dict[str, dict[str, Tensor]]:
        """Section -> name -> a copy of its rows, all finished on return. The copies of the call before are gone.

        Rows on a GPU go to pinned memory without waiting for one another, in the order of the work queued there, so
        that an update queued before this call is in the copy and one queued after it is not.
        """
        copies = {section: {name: self._copy(f"{section}/{name}", rows.local) for name, rows in tensors.items()}
                  for section, tensors in sections.items()}  # fmt: skip
        if any(rows.local.is_cuda for tensors in sections.values() for rows in tensors.values()):
            torch.cuda.synchronize()
        return copies

    def _copy(self, key: str, source: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(source, non_blocking=source.is_cuda)

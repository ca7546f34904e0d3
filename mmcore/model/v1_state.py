"""What a v1 mosaic remembers between calls when it decodes: the key recurrences, and the contextual pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.model.documents import Packing
from mmcore.model.state import AttentionState, DecodingState, Part


class LeakyState(Part):
    """The key recurrence of one memory for B rows, and the last `reach` inputs, which later keys are computed from."""

    def __init__(self, owner: DecodingState, reach: int) -> None:
        super().__init__(owner)
        self.reach = reach
        self.scan: tuple[Tensor, Tensor] | None = None
        self.past: Tensor | None = None  # [B, reach, d]

    def enter(self, y_BTd: Tensor) -> tuple[Tensor, Packing, Tensor | None]:
        """The next inputs, zero where a row is padding; where rows begin; and the inputs before them."""
        T, padding, past = y_BTd.shape[1], self.owner.padding, self.past
        packing = Packing()
        if padding is not None:
            times = torch.arange(self.owner.length, self.owner.length + T, device=padding.device)
            packing = Packing(resets=times == padding[:, None])
            if self.reach:
                y_BTd = y_BTd * (times >= padding[:, None])[..., None]
        if self.reach:
            if past is None:
                past = y_BTd.new_zeros(y_BTd.shape[0], self.reach, y_BTd.shape[2])
            self.past = torch.cat([past, y_BTd], dim=1)[:, -self.reach :].clone()
        return y_BTd, packing, past

    def tensors(self) -> dict[str, Tensor]:
        if self.scan is None:
            return {}
        vector, log_scale = self.scan
        found = {"scan_vector": vector, "scan_log_scale": log_scale}
        return found if self.past is None else found | {"past": self.past}

    def load(self, tensors: dict[str, Tensor], length: int) -> None:
        """Take over saved tensors of a state that had been fed `length` tokens."""
        self.scan = (tensors["scan_vector"].clone(), tensors["scan_log_scale"].clone())
        self.past = tensors["past"].clone() if self.reach else None


class PairState(AttentionState):
    """State of one contextual memory for B rows: all completed pairs, and the `shift` newest, which wait for the token
    that completes them."""

    def __init__(self, owner: DecodingState, reach: int, shift: int) -> None:
        super().__init__(owner, None)
        self.leaky = LeakyState(owner, reach)
        self.shift = shift
        self.pending_keys: Tensor | None = None  # [B, shift, H, D], zeros where there were no tokens yet
        self.pending_raw: Tensor | None = None  # the same of v~; None where values are not mixes

    @property
    def scan(self) -> tuple[Tensor, Tensor] | None:
        return self.leaky.scan

    @scan.setter
    def scan(self, scan: tuple[Tensor, Tensor]) -> None:
        self.leaky.scan = scan

    def enter(self, y_BTd: Tensor) -> tuple[Tensor, Packing, Tensor | None]:
        return self.leaky.enter(y_BTd)

    def append(self, keys_BTHD: Tensor, values_BTHD: Tensor, raw_BTHD: Tensor | None) -> None:
        """The keys of T new tokens, and the values that they complete: at t that of the pair of t - shift."""
        B, T, H, D = keys_BTHD.shape
        if self.shift == 0:
            self.store.append(keys_BTHD, values_BTHD)
            return
        empty = keys_BTHD.new_zeros(B, self.shift, H, D)
        keys = torch.cat([empty if self.pending_keys is None else self.pending_keys, keys_BTHD], dim=1)
        unreal = min(T, max(0, self.shift - self.owner.length))  # values of pairs before the first token
        self.store.reserve(1, keys)
        self.store.append(keys[:, unreal:T], values_BTHD[:, unreal:])
        self.pending_keys = keys[:, T:].clone()
        if raw_BTHD is not None:
            before = empty if self.pending_raw is None else self.pending_raw
            self.pending_raw = torch.cat([before, raw_BTHD], dim=1)[:, T:].clone()

    def tensors(self) -> dict[str, Tensor]:
        waiting = {"pending_keys": self.pending_keys, "pending_raw": self.pending_raw}
        found = super().tensors() | self.leaky.tensors()
        return found | {name: tensor for name, tensor in waiting.items() if tensor is not None}

    def load(self, tensors: dict[str, Tensor], length: int) -> None:
        super().load(tensors, max(0, length - self.shift))
        self.leaky.load(tensors, length)
        self.pending_keys, self.pending_raw = (
            tensors[name].clone() if name in tensors else None for name in ("pending_keys", "pending_raw")
        )

"""What a model remembers between calls when it decodes.

A memory's state is the key recurrence, the newest pair still waiting for its next value, and the completed pairs:
the last h - 1 for a short-term memory, all for a long-term one. Rows of unequal length are padded on the left;
the padding is a document of its own that no query reads.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcore.kernels import allocator
from mmcore.kernels.layout import FLOATS


class Store:
    """A growing row of pairs, [B, capacity, H, D] keys and values, in order of time, in `dtype` or, None, that of what is
    appended.

    With a window only the newest `window - 1` pairs are kept: they move to the front when the buffer is full, which
    costs one copy of them in three windows of tokens, and to a new buffer if this one is `marked`. Without a window the
    buffer doubles.
    """

    def __init__(self, window: int | None, dtype: torch.dtype | None = None) -> None:
        self.window, self.dtype = window, dtype
        self.first = 0  # time of the pair in slot 0
        self.used = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.lent = False  # the pairs are another store's, which must not change meanwhile: see branch
        self.marked = False  # somebody may come back to pairs of this buffer, or was given them: see mark, keep_pairs

    def append(self, keys_BTHD: Tensor, values_BTHD: Tensor) -> None:
        """Add T completed pairs."""
        if self.lent:
            return
        count = keys_BTHD.shape[1]
        self.reserve(count, keys_BTHD)
        self.keys[:, self.used : self.used + count] = keys_BTHD
        self.values[:, self.used : self.used + count] = values_BTHD
        self.used += count

    def reserve(self, count: int, like: Tensor) -> None:
        """Make room for `count` more pairs of the shape of `like`, [B, ., H, D]."""
        if self.lent or (self.keys is not None and self.used + count <= self.keys.shape[1]):
            return
        kept = self.kept
        if self.window is not None and self.keys is not None and not self.marked:
            if kept + count <= self.keys.shape[1] and 2 * kept <= self.used:
                for part in (self.keys, self.values):
                    part[:, :kept] = part[:, self.used - kept : self.used]
                self.first, self.used = self.first + self.used - kept, kept
                return
        B, _, H, D = like.shape
        capacity = 0 if self.keys is None else self.keys.shape[1]
        if self.window is None:
            capacity = max(2 * capacity, kept + count, 512)
        else:
            capacity = max(kept + count, 4 * self.window)
        old = (self.keys, self.values)
        # A large page is cleared whole when it is first touched: of a store that is mostly room to grow, that takes longer
        # than reading a short prompt (8 rows of 64 tokens: 716 tokens/s for 2,390).
        make = allocator.empty if like.is_cpu and 4 * (kept + count) >= capacity else like.new_empty
        shape, dtype = (B, capacity, H, D), self.dtype or like.dtype
        self.keys, self.values = make(shape, dtype=dtype), make(shape, dtype=dtype)
        if kept:
            for new, source in zip((self.keys, self.values), old, strict=True):
                new[:, :kept] = source[:, self.used - kept : self.used]
        self.first, self.used, self.marked = self.first + self.used - kept, kept, False

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Keys and values held, each [B, used, H, D], views."""
        return self.keys[:, : self.used], self.values[:, : self.used]

    def mark(self, room: int) -> tuple[Any, ...]:
        """Where the store is, for `rewind`; with space for `room` more pairs, so that going on from the mark again and
        again never moves the old ones. Pairs of a marked buffer are only ever added, so nothing is copied."""
        if self.keys is not None:
            self.reserve(room, self.keys)
        self.marked = True
        return self.first, self.used, self.keys, self.values

    def rewind(self, mark: tuple[Any, ...]) -> None:
        self.first, self.used, self.keys, self.values = mark
        self.marked = True  # it may be needed once more

    @property
    def kept(self) -> int:
        """Pairs that can still be read: all, or the newest of a window."""
        return self.used if self.window is None else min(self.used, self.window - 1)

    def branch(self, rows: int, room: int, lent: bool) -> Store:
        """A store of `rows` rows that each go on from this one's only row, with space for `room` more pairs.

        `lent`: nobody will read what is appended, so it is dropped, and the pairs are read where they lie, uncopied.
        """
        other, kept = copy.copy(self), self.kept
        other.first, other.used, other.lent, other.marked = self.first + self.used - kept, kept, lent, False
        if self.keys is not None:
            old = [part[:, self.used - kept : self.used].expand(rows, -1, -1, -1) for part in (self.keys, self.values)]
            if not lent:
                shape = (rows, kept + room, *self.keys.shape[2:])
                new = [part.new_empty(shape) for part in old]
                for mine, theirs in zip(new, old, strict=True):
                    mine[:, :kept] = theirs
                old = new
            other.keys, other.values = old
        return other


class Part:
    """What one memory or layer remembers, a part of the DecodingState `owner`. The part does not keep its owner: in a
    circle, pairs that nobody needs any more would lie there until Python looks for circles (8 rows of 64 tokens, read 40
    times, held 1.5 GB for 17 MB)."""

    def __init__(self, owner: DecodingState) -> None:
        self._owner = weakref.ref(owner)  # not by belong_to: fields are found faster while nobody has asked for vars

    @property
    def owner(self) -> DecodingState:
        return self._owner()

    def belong_to(self, owner: DecodingState) -> None:
        """Become a part of another state, with the parts that this one has itself."""
        self._owner = weakref.ref(owner)
        for part in vars(self).values():
            if isinstance(part, Part):
                part.belong_to(owner)

    def keep_pairs(self) -> None:
        """Move no stored pair within its buffer, which somebody else may be reading from now on."""


class AttentionState(Part):
    """Keys and values of one attention layer for B rows; a query also reads its own pair, so nothing waits."""

    def __init__(self, owner: DecodingState, window: int | None) -> None:
        super().__init__(owner)
        self.store = Store(window, owner.pair_dtype)

    def append(self, keys_BTHD: Tensor, values_BTHD: Tensor) -> None:
        self.store.append(keys_BTHD, values_BTHD)

    def pairs(self) -> tuple[Tensor, Tensor]:
        return self.store.pairs()

    def keep_pairs(self) -> None:
        self.store.marked = True

    def mark(self, room: int) -> tuple[Any, ...]:
        return (self.store.mark(room),)

    def rewind(self, mark: tuple[Any, ...]) -> None:
        self.store.rewind(mark[0])

    def branch(self, source: AttentionState, rows: int, room: int, lent: bool) -> None:
        """Become `rows` rows that go on from the only row of `source`; see Store.branch."""
        self.store = source.store.branch(rows, room, lent)

    def query_offset(self) -> int:
        """Slot at which the first of the newest queries stands."""
        return self.owner.length - self.store.first

    def starts(self, count: int) -> Tensor | None:
        """int32 [B, count]: the slot of each row's first pair; None where no row is padded."""
        if self.owner.padding is None:
            return None
        slots = (self.owner.padding - self.store.first).clamp(min=0).to(torch.int32)
        return slots[:, None].expand(-1, count).contiguous()

    def tensors(self) -> dict[str, Tensor]:
        if self.store.keys is None:
            return {}
        keys, values = self.store.pairs()
        return {"keys": keys, "values": values}

    def load(self, tensors: dict[str, Tensor], length: int) -> None:
        """Take over saved tensors of a state that had been fed `length` tokens."""
        keys, values = tensors["keys"], tensors["values"]
        self.store = Store(self.store.window, self.store.dtype)
        self.store.first = length - keys.shape[1]
        self.store.reserve(max(1, keys.shape[1]), keys)
        self.store.append(keys, values)


class MemoryState(AttentionState):
    """State of one contextual memory of one layer for B rows."""

    def __init__(self, owner: DecodingState, window: int | None) -> None:
        super().__init__(owner, window)
        self.scan: tuple[Tensor, Tensor] | None = None
        self.pending_key: Tensor | None = None  # [B, 1, H, D]
        self.pending_raw: Tensor | None = None  # [B, 1, H, D], v~ of the newest token

    def begin(self, rows: int, heads: int, size: int) -> None:
        """Make room for the recurrence and the pair that waits, before the first token, on a CPU."""
        self.pending_key, self.pending_raw = (torch.zeros(rows, 1, heads, size, **FLOATS) for _ in range(2))
        self.scan = torch.zeros(rows, heads, size, **FLOATS), torch.zeros(rows, heads, **FLOATS)

    def append(self, keys_BTHD: Tensor, raw_BTHD: Tensor, complete: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Complete the waiting pair and all new ones but the last, which waits in its turn.

        `complete(raw, following)` is equation (9) for v~ [B, N, H, D] and the v~ [B, H, D] after the last of them.
        """
        keys, raw = keys_BTHD, raw_BTHD
        if self.pending_key is not None:
            if keys_BTHD.shape[1] == 1:  # decoding: nothing to join
                self.store.append(self.pending_key, complete(self.pending_raw, raw_BTHD[:, 0]))
                self.pending_key, self.pending_raw = keys_BTHD, raw_BTHD
                return
            keys, raw = torch.cat([self.pending_key, keys], 1), torch.cat([self.pending_raw, raw], 1)
        if keys.shape[1] > 1:
            self.store.append(keys[:, :-1], complete(raw[:, :-1], raw[:, -1]))
        else:
            self.store.reserve(1, keys)
        self.pending_key, self.pending_raw = keys[:, -1:].clone(), raw[:, -1:].clone()

    def mark(self, room: int) -> tuple[Any, ...]:
        scan = None if self.scan is None else tuple(part.clone() for part in self.scan)
        pending = (self.pending_key, self.pending_raw)
        return *super().mark(room), scan, *(None if part is None else part.clone() for part in pending)

    def rewind(self, mark: tuple[Any, ...]) -> None:
        store, scan, key, raw = mark
        self.store.rewind(store)
        # Copies again: the compiled step writes in place, and the mark may be needed once more.
        self.scan = None if scan is None else tuple(part.clone() for part in scan)
        self.pending_key, self.pending_raw = (None if part is None else part.clone() for part in (key, raw))

    def branch(self, source: MemoryState, rows: int, room: int, lent: bool) -> None:
        super().branch(source, rows, room, lent)
        if source.pending_key is not None:
            parts = (source.pending_key, source.pending_raw, *source.scan)
            self.pending_key, self.pending_raw, *scan = (part.expand(rows, *part.shape[1:]).clone() for part in parts)
            self.scan = tuple(scan)

    def resets(self, count: int) -> Tensor | None:
        """bool [B, count]: where the new tokens begin a row."""
        if self.owner.padding is None:
            return None
        times = torch.arange(self.owner.length, self.owner.length + count, device=self.owner.padding.device)
        return times[None, :] == self.owner.padding[:, None]

    def tensors(self) -> dict[str, Tensor]:
        if self.pending_key is None:
            return {}
        vector, log_scale = self.scan
        return super().tensors() | {
            "pending_key": self.pending_key, "pending_raw": self.pending_raw,
            "scan_vector": vector, "scan_log_scale": log_scale,
        }

    def load(self, tensors: dict[str, Tensor], length: int) -> None:
        super().load(tensors, length - 1)  # the newest token's pair still waits
        self.scan = (tensors["scan_vector"].clone(), tensors["scan_log_scale"].clone())
        self.pending_key, self.pending_raw = tensors["pending_key"].clone(), tensors["pending_raw"].clone()


@dataclass(frozen=True)
class Mark:
    """A moment of a DecodingState; see there."""

    length: int
    memories: dict[str, tuple[Any, ...] | dict[str, Any]]


class DecodingState:
    """Everything a model remembers of B rows. `length` counts the tokens fed, padding included. Pairs are kept in
    `pair_dtype`, or as they were computed."""

    def __init__(self, batch_size: int, padding: Tensor | None = None, pair_dtype: torch.dtype | None = None) -> None:
        self.batch_size = batch_size
        self.pair_dtype = pair_dtype
        self.length = 0
        self.padding = padding
        self.memories: dict[str, AttentionState] = {}
        # The compiled form of `advance`, made when it is first called; False: there is none. It looks at the weights when
        # it is made, so a state must not outlive a change of weights (its memories would not fit them anyway).
        self.whole_step: Callable | bool | None = None
        self.handles = 0  # hooks that PyTorch had numbered when the model was last looked at for it

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodingState:
        """Another state that goes on from here by itself. Marks of the one are none of the other, but for those that are
        copied along with it."""
        other = memo[id(self)] = object.__new__(type(self))
        fields = {name: value for name, value in vars(self).items() if name != "whole_step"}
        vars(other).update(copy.deepcopy(fields, memo))
        for memory in other.memories.values():
            memory.belong_to(other)
        other.whole_step = self._step_for_another()
        return other

    def __copy__(self) -> DecodingState:
        raise TypeError("a DecodingState and a shallow copy would write into the same memories: take copy.deepcopy")

    def _step_for_another(self) -> Callable | bool | None:
        """What a state of the same model has as its whole_step: a new one takes longer to make than most branches live."""
        step = self.whole_step
        return (step.for_another_state() if step.pieces else None) if step else step

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, to be saved; `load` takes them back.

        No token that is read later changes them. What is read after a `rewind` or `take_back` may: pairs, most of a state,
        are not copied, and the newest can then be written over; clone what is to be kept beyond that.
        """
        for memory in self.memories.values():
            memory.keep_pairs()
        # Steps write in place into all but stored pairs.
        return {name: tensor if name.endswith((".keys", ".values")) else tensor.clone()
                for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        """`tensors` as they lie."""
        found = {} if self.padding is None else {"padding": self.padding}
        for name, memory in self.memories.items():
            found.update({f"{name}.{key}": value for key, value in memory.tensors().items()})
        return found | {"length": torch.tensor(self.length)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a state that `tensors` of a state of the same model gave."""
        length = int(tensors["length"])
        self.padding = tensors.get("padding")
        for name, memory in self.memories.items():
            parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
            if parts:  # a memory that was knocked out has none
                memory.load(parts, length)
        self.length = length

    def mark(self, room: int = 0) -> Mark:
        """The present moment, to `rewind` to as often as wanted; the next `room` tokens then move no stored pair.
        Costs a few vectors for each memory, whatever the length; a memory whose class has no `mark` of its own is
        copied."""
        marks = {name: memory.mark(room) if "mark" in vars(type(memory)) else _copy(memory)
                 for name, memory in self.memories.items()}
        return Mark(self.length, marks)

    def rewind(self, mark: Mark) -> None:
        """Forget what was read after `mark`. Marks made later than it are void from then on."""
        self.length = mark.length
        for name, memory in self.memories.items():
            if isinstance(mark.memories[name], dict):
                vars(memory).update(_copy(memory, mark.memories[name]))
                memory.belong_to(self)
            else:
                memory.rewind(mark.memories[name])

    def take_back(self) -> None:
        """Undo the last token, which must have been the last that happened to this state; see LanguageModel.takes_back."""
        self.whole_step.take_back(tuple(self.memories.values()))
        self.length -= 1

    def branch(self, source: DecodingState, room: int, lent: Collection[str] = ()) -> None:
        """Become rows that each go on, by at most `room` tokens, from the only row of `source`, an unpadded state of the
        same model that must not change meanwhile.

        `lent`: memories no query of those tokens reads a pair of them from (a long-term one, for fewer tokens than its
        delay): their pairs are not copied.
        """
        self.length = source.length
        self.whole_step, self.handles = source._step_for_another(), source.handles
        for name, memory in self.memories.items():
            memory.branch(source.memories[name], self.batch_size, room, name in lent)

    def branch_bytes(self, lent: Collection[str] = ()) -> int:
        """Memory that a row of a branch takes, in bytes, what it appends not counted."""
        stores = [memory.store for name, memory in self.memories.items() if name not in lent]
        return sum(2 * store.keys[:, : store.kept].numel() * store.keys.element_size() for store in stores
                   if store.keys is not None)

    @property
    def bytes(self) -> int:
        """Memory that the state's tensors fill, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())


def _copy(memory: Any, fields: dict[str, Any] | None = None) -> dict[str, Any]:
    """All that a memory's state consists of (or `fields` of one), copied."""
    return copy.deepcopy(vars(memory) if fields is None else fields)

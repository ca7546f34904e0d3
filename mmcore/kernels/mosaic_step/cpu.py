"""The compiled steps: addresses of weights once, of states when they move."""

from __future__ import annotations

import copy
import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmcore.kernels import native
from mmcore.kernels.layout import FLOATS
from mmcore.kernels.linear import cpu as linear
from mmcore.kernels.memory_read import cpu as memory_read
from mmcore.kernels.thin_linear import cpu as thin_linear
from mmcore.kernels.thin_linear.cpu import FORMATS, MOST_ROWS

if TYPE_CHECKING:
    from mmcore.kernels.mosaic_step import LayerWeights, Matrix, MemoryWeights


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64
_Weights = _structure("Weights", weight=_ADDRESS, scale=_ADDRESS)
_Memory = _structure(
    "Memory",
    **dict.fromkeys(("key", "value", "gate", "decay"), _Weights),
    **dict.fromkeys(("mix", "scale", "base", "slope", "exponent", "vector", "log_scale", "pending_key", "pending_raw",
                     "keys", "values"), _ADDRESS),
    **dict.fromkeys(("narrow", "apart", "used", "first", "window", "delay", "fresh", "lent"), _INT),
)
_Layer = _structure(
    "Layer", memory_norm=_ADDRESS, persistent_norm=_ADDRESS, **dict.fromkeys(("out", "gate", "up", "down"), _Weights),
    memories=_Memory * 2,
)
_Shape = _structure(
    "Shape", **dict.fromkeys(("layers", "width", "heads", "inner", "vocabulary"), _INT),
    eps=ctypes.c_float, format=ctypes.c_int32,
)
_Functions = _structure(
    "Functions",
    **dict.fromkeys(("linear", "linear_scratch", "thin", "thin_scratch", "read", "read_scratch", "read_few",
                     "read_few_scratch"), _ADDRESS),
    **dict.fromkeys(("thin_rows", "few_queries", "flops_of_a_thread"), _INT),
)


_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    mm_mosaic_step=[_ADDRESS] * 3 + [_Weights, _ADDRESS, ctypes.c_int] + [_ADDRESS] * 3 + [_INT] * 2
    + [_ADDRESS, ctypes.c_int],
    mm_are_words=(ctypes.c_int, [_ADDRESS, _INT, _INT]),
    mm_mosaic_step_scratch=(_INT, [_ADDRESS, _INT, ctypes.c_int]),
)
_C_PIECE = native.functions(
    Path(__file__).with_name("cpu_piece.c"),
    mm_mosaic_piece=[_ADDRESS] * 4 + [_Weights] + [_ADDRESS] * 3 + [_INT] * 4 + [_ADDRESS] + [_INT] * 2,
    mm_mosaic_piece_scratch=(_INT, [_ADDRESS] * 3 + [_INT] * 4),
)


@functools.cache
def _functions() -> ctypes.Structure:
    """The other kernels, as a piece calls them."""
    found = [
        linear._C.mm_linear, linear._C.mm_linear_scratch,
        thin_linear._C.mm_thin_linear, thin_linear._C.mm_thin_linear_scratch,
        memory_read._C.memory_read_forward, memory_read._C.memory_read_forward_scratch,
        memory_read._C_FEW.memory_read_few, memory_read._C_FEW.memory_read_few_scratch,
    ]  # fmt: skip
    addresses = (ctypes.cast(function, _ADDRESS).value for function in found)
    return _Functions(*addresses, MOST_ROWS, memory_read.FEW, linear._FLOPS_OF_A_THREAD)


class _Bound(NamedTuple):
    """What the step knows of a memory: while it is the same, so are all addresses."""

    store: Any
    pending_key: Tensor | None
    scan: tuple[Tensor, Tensor] | None
    keys: Tensor | None
    room: int
    """Pairs that `keys` has room for."""


_UNBOUND = _Bound(None, None, None, None, 0)


class Step:
    """`step(x, memories, position, padding, last_only) -> logits`; see `mosaic_step`."""

    pieces = True  # it takes any number of tokens, and the first ones, too

    def __init__(
        self, layers: Sequence[LayerWeights], norm: Tensor, classifier: Matrix, heads: int, eps: float,
        embedding: Tensor | None = None,
    ) -> None:
        self._kept: list[Tensor] = []  # what the addresses point to must live as long as they
        self._norm = self._exact(norm)
        self._classifier = self._matrix(classifier)
        vocabulary, width = classifier.weight.shape
        inner = layers[0].gate.weight.shape[0]
        self._shape = _Shape(len(layers), width, heads, inner, vocabulary, eps, FORMATS[classifier.weight.dtype])
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        self.takes_ids = embedding is not None and embedding.dtype in FORMATS and embedding.is_contiguous()
        """Whether it finds the embeddings of single tokens by itself: what Python and PyTorch do between two tokens is done
        with caches that hold weights, 35 us for an embedding."""
        if self.takes_ids:
            self._embedding, self._words = embedding.detach(), len(embedding)
            self._table = self._address(self._embedding), FORMATS[embedding.dtype]
        self._take_no_state()

    def for_another_state(self) -> Step:
        """The same weights, for another state of the same model: the addresses of states are each step's own."""
        other = copy.copy(self)
        other._layers = type(self._layers).from_buffer_copy(self._layers)
        other._take_no_state()
        return other

    def _take_no_state(self) -> None:
        self._memories = [memory for layer in self._layers for memory in layer.memories]
        self._bound = [_UNBOUND] * len(self._memories)  # whose addresses are in place
        self._scratch: dict[tuple[int, int], Tensor] = {}  # of tokens, by rows and threads
        self._work: Tensor | None = None  # of pieces, from one to the next

    def __call__(
        self, x: Tensor, memories: Sequence[Any], position: int, padding: Tensor | None = None, last_only: bool = True
    ) -> Tensor:
        rows, count = x.shape[:2]
        padding = None if padding is None else padding.data_ptr()
        x = x.contiguous()
        if x.dtype is torch.int64:
            self._require_words(x)
        elif x.dtype is not torch.float32:
            x = x.float()  # of an embedding in fp64
        fresh = self._take(memories, count, rows)
        if count == 1 and rows <= MOST_ROWS and not fresh:
            logits = self._token(x, position, padding)
            return logits if last_only else logits[:, None]
        if x.dtype is torch.int64:
            x = torch.nn.functional.embedding(x, self._embedding).float()
        logits = self._piece(x, position, padding, 1 if last_only else count)
        return logits[:, 0] if last_only else logits

    def _token(self, x: Tensor, position: int, padding: int | None) -> Tensor:
        """One token of each of a few rows; its id, or its embedding [B, 1, d], -> [B, V]."""
        self._work = None  # 20 MB at d = 512 for a piece of 512 tokens: not to be held while nothing is read
        rows, threads = len(x), torch.get_num_threads()
        if (rows, threads) not in self._scratch:
            size = _C.mm_mosaic_step_scratch(ctypes.byref(self._shape), rows, threads)
            self._scratch[rows, threads] = torch.empty(size, **FLOATS)
        logits = torch.empty(rows, self._shape.vocabulary, **FLOATS)
        table, ids = (self._table, x.data_ptr()) if x.dtype is torch.int64 else ((x.data_ptr(), 0), None)
        _C.mm_mosaic_step(
            ctypes.byref(self._shape), self._layers, self._norm, self._classifier, *table, ids, logits.data_ptr(),
            self._scratch[rows, threads].data_ptr(), rows, position, padding, threads,
        )
        return logits

    def _require_words(self, ids: Tensor) -> None:
        """Raises IndexError as looking embeddings up does, before anything has changed. The classifier may know more words
        than there are embeddings, or fewer."""
        if not _C.mm_are_words(ids.data_ptr(), ids.numel(), self._words):
            raise IndexError(f"a token id is not one of {self._words:,}: {ids.flatten().tolist()}")

    def _piece(self, x: Tensor, position: int, padding: int | None, wanted: int) -> Tensor:
        """Any number of tokens; x [B, T, d] -> [B, wanted, V]."""
        rows, count, _ = x.shape
        threads = torch.get_num_threads()
        shares = memory_read._shares(rows * self._shape.heads, count, threads)
        model = ctypes.byref(self._shape), ctypes.byref(_functions()), self._layers
        size = _C_PIECE.mm_mosaic_piece_scratch(*model, rows, count, threads, shares)
        if self._work is None or self._work.numel() < size:
            self._work = torch.empty(size, **FLOATS)
        logits = torch.empty(rows, wanted, self._shape.vocabulary, **FLOATS)
        _C_PIECE.mm_mosaic_piece(
            *model, self._norm, self._classifier, x.data_ptr(), logits.data_ptr(), self._work.data_ptr(), rows, count,
            position, wanted, padding, threads, shares,
        )
        return logits

    def _take(self, memories: Sequence[Any], count: int, rows: int) -> bool:
        """Make room for `count` tokens in every memory and take its addresses; its counters are those after them. Whether
        one of them has read nothing yet."""
        fresh = False
        for number, (memory, fields, bound) in enumerate(zip(memories, self._memories, self._bound, strict=True)):
            store = memory.store
            if (
                store is not bound.store or memory.pending_key is not bound.pending_key or memory.scan is not bound.scan
                or store.keys is not bound.keys or store.used + count > bound.room
            ):  # fmt: skip
                fresh |= self._bind(number, memory, count, rows)
            fields.used, fields.first = store.used, store.first
            if not store.lent:
                store.used += count - fields.fresh
        return fresh

    def _bind(self, number: int, memory: Any, count: int, rows: int) -> bool:
        """Take the addresses of a memory's tensors, which stay where they are from token to token, but for a growth of the
        store or a rewind. Whether it has read nothing yet."""
        store, fields, fresh = memory.store, self._memories[number], memory.pending_key is None
        if fresh:
            memory.begin(rows, self._shape.heads, self._shape.width // self._shape.heads)
        store.reserve(count, memory.pending_key)
        tensors = (*memory.scan, memory.pending_key, memory.pending_raw, store.keys, store.values)
        fields.vector, fields.log_scale, fields.pending_key, fields.pending_raw, fields.keys, fields.values = (
            tensor.data_ptr() for tensor in tensors
        )
        fields.narrow, fields.apart = store.keys.dtype is torch.float16, store.keys.stride(0)
        fields.lent, fields.fresh = store.lent, fresh
        room = 0 if fresh else 1 << 62 if store.lent else store.keys.shape[1]  # a fresh one is bound once more
        self._bound[number] = _Bound(store, memory.pending_key, memory.scan, store.keys, room)
        return fresh

    def _layer(self, layer: LayerWeights) -> ctypes.Structure:
        memories = (_Memory * 2)(self._memory(layer.short_term), self._memory(layer.long_term))
        return _Layer(
            self._exact(layer.memory_norm), self._exact(layer.persistent_norm), self._matrix(layer.out),
            self._matrix(layer.gate), self._matrix(layer.up), self._matrix(layer.down), memories,
        )

    def _memory(self, memory: MemoryWeights) -> ctypes.Structure:
        matrices = (memory.key, memory.value, memory.gate, memory.decay)
        scalars = (memory.mix, memory.scale, memory.base, memory.slope, memory.exponent)
        fields = _Memory(*map(self._matrix, matrices), *map(self._exact, scalars))
        fields.window, fields.delay = memory.window or 0, memory.delay
        return fields

    def _matrix(self, matrix: Matrix) -> ctypes.Structure:
        return _Weights(self._address(matrix.weight), None if matrix.scale is None else self._exact(matrix.scale))

    def _address(self, tensor: Tensor) -> int:
        tensor = tensor.detach()  # a parameter may be given other memory (.data, .to), and the address is of this
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _exact(self, tensor: Tensor) -> int:
        return self._address(tensor.detach().float().contiguous())

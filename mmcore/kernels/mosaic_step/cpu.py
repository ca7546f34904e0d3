"""The compiled step: addresses of weights once, of states when they move."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcore.kernels import native
from mmcore.kernels.thin_linear.cpu import FORMATS

if TYPE_CHECKING:
    from mmcore.kernels.mosaic_step import LayerWeights, Matrix, MemoryWeights


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64
_Matrix = _structure("Matrix", weight=_ADDRESS, scale=_ADDRESS)
_Memory = _structure(
    "Memory",
    **dict.fromkeys(("key", "value", "gate", "decay"), _Matrix),
    **dict.fromkeys(("mix", "scale", "base", "slope", "exponent", "vector", "log_scale", "pending_key", "pending_raw",
                     "keys", "values"), _ADDRESS),
    **dict.fromkeys(("narrow", "capacity", "used", "first", "window", "delay"), _INT),
)
_Layer = _structure(
    "Layer", memory_norm=_ADDRESS, persistent_norm=_ADDRESS, **dict.fromkeys(("out", "gate", "up", "down"), _Matrix),
    memories=_Memory * 2,
)
_Shape = _structure(
    "Shape", **dict.fromkeys(("layers", "width", "heads", "inner", "vocabulary"), _INT),
    eps=ctypes.c_float, format=ctypes.c_int32,
)


_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    mm_mosaic_step=[_ADDRESS] * 3 + [_Matrix] + [_ADDRESS] * 3 + [_INT] * 2 + [_ADDRESS, ctypes.c_int],
    mm_mosaic_step_scratch=(_INT, [_ADDRESS, _INT, ctypes.c_int]),
)


class Step:
    """`step(x, memories, position, padding) -> logits`; see `mosaic_step`."""

    def __init__(self, layers: Sequence[LayerWeights], norm: Tensor, classifier: Matrix, heads: int, eps: float) -> None:
        self._kept: list[Tensor] = []  # what the addresses point to must live as long as they
        self._norm = self._exact(norm)
        self._classifier = self._matrix(classifier)
        vocabulary, width = classifier.weight.shape
        inner = layers[0].gate.weight.shape[0]
        self._shape = _Shape(len(layers), width, heads, inner, vocabulary, eps, FORMATS[classifier.weight.dtype])
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        self._memories = [memory for layer in self._layers for memory in layer.memories]
        self._bound: list[tuple[Tensor | None, ...]] = [(None,) * 6] * len(self._memories)  # whose addresses are in place
        self._scratch: dict[tuple[int, int], Tensor] = {}

    def __call__(self, x: Tensor, memories: Sequence[Any], position: int, padding: Tensor | None = None) -> Tensor:
        rows, threads = x.numel() // self._shape.width, torch.get_num_threads()
        if (rows, threads) not in self._scratch:
            size = _C.mm_mosaic_step_scratch(ctypes.byref(self._shape), rows, threads)
            self._scratch[rows, threads] = torch.empty(size)
        for number, (memory, fields) in enumerate(zip(memories, self._memories, strict=True)):
            store = memory.store
            store.reserve(1, memory.pending_key)
            tensors = (*memory.scan, memory.pending_key, memory.pending_raw, store.keys, store.values)
            if any(new is not old for new, old in zip(tensors, self._bound[number], strict=True)):
                self._bind(number, tensors)
            fields.used, fields.first = store.used, store.first
            store.used += 1
        logits = torch.empty(rows, self._shape.vocabulary)
        _C.mm_mosaic_step(
            ctypes.byref(self._shape), self._layers, self._norm, self._classifier, x.data_ptr(), logits.data_ptr(),
            self._scratch[rows, threads].data_ptr(), rows, position, None if padding is None else padding.data_ptr(),
            threads,
        )
        return logits

    def _bind(self, number: int, tensors: tuple[Tensor, ...]) -> None:
        """Take the addresses of a memory's tensors, which stay where they are from token to token, but for a growth of the
        store or a rewind."""
        self._bound[number], fields = tensors, self._memories[number]
        fields.vector, fields.log_scale, fields.pending_key, fields.pending_raw, fields.keys, fields.values = (
            tensor.data_ptr() for tensor in tensors
        )
        keys = tensors[4]
        fields.narrow, fields.capacity = keys.dtype is torch.float16, keys.shape[1]

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
        return _Matrix(self._address(matrix.weight), None if matrix.scale is None else self._exact(matrix.scale))

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _exact(self, tensor: Tensor) -> int:
        return self._address(tensor.detach().float().contiguous())

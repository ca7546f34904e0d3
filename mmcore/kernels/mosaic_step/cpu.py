"""The compiled step: addresses of weights once, of states at every token (some 20 us a token at 8 layers)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmcore.kernels import native

if TYPE_CHECKING:
    from mmcore.kernels.mosaic_step import LayerWeights, MemoryWeights


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64
_Memory = _structure(
    "Memory",
    **dict.fromkeys(("key", "value", "gate", "decay", "mix", "scale", "base", "slope", "exponent", "vector", "log_scale",
                     "pending_key", "pending_raw", "keys", "values"), _ADDRESS),
    **dict.fromkeys(("used", "first", "window", "delay"), _INT),
)
_Layer = _structure(
    "Layer", **dict.fromkeys(("memory_norm", "persistent_norm", "out", "gate", "up", "down"), _ADDRESS),
    memories=_Memory * 2,
)
_Shape = _structure(
    "Shape", **dict.fromkeys(("layers", "width", "heads", "inner", "vocabulary"), _INT),
    eps=ctypes.c_float, bf16=ctypes.c_int32,
)


_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    mm_mosaic_step=[_ADDRESS] * 7 + [_INT, ctypes.c_int],
    mm_mosaic_step_scratch=(_INT, [_ADDRESS, ctypes.c_int]),
)


class Step:
    """`step(x, memories, position) -> logits`; see `mosaic_step`."""

    def __init__(self, layers: Sequence[LayerWeights], norm: Tensor, classifier: Tensor, heads: int, eps: float) -> None:
        self._kept: list[Tensor] = []  # what the addresses point to must live as long as they
        self._norm = self._exact(norm)
        self._classifier = self._address(classifier)
        vocabulary, width = classifier.shape
        inner = layers[0].gate.shape[0]
        widened = classifier.dtype is torch.bfloat16
        self._shape = _Shape(len(layers), width, heads, inner, vocabulary, eps, widened)
        self._layers = (_Layer * len(layers))(*map(self._layer, layers))
        self._memories = [memory for layer in self._layers for memory in layer.memories]
        self._scratch: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, memories: Sequence[Any], position: int) -> Tensor:
        threads = torch.get_num_threads()
        if threads not in self._scratch:
            self._scratch[threads] = torch.empty(_C.mm_mosaic_step_scratch(ctypes.byref(self._shape), threads))
        for memory, fields in zip(memories, self._memories, strict=True):
            store = memory.store
            store.reserve(1, memory.pending_key)
            vector, log_scale = memory.scan
            fields.vector, fields.log_scale = vector.data_ptr(), log_scale.data_ptr()
            fields.pending_key, fields.pending_raw = memory.pending_key.data_ptr(), memory.pending_raw.data_ptr()
            fields.keys, fields.values = store.keys.data_ptr(), store.values.data_ptr()
            fields.used, fields.first = store.used, store.first
            store.used += 1
        logits = torch.empty(self._shape.vocabulary)
        _C.mm_mosaic_step(
            ctypes.byref(self._shape), self._layers, self._norm, self._classifier, x.data_ptr(), logits.data_ptr(),
            self._scratch[threads].data_ptr(), position, threads,
        )
        return logits

    def _layer(self, layer: LayerWeights) -> ctypes.Structure:
        memories = (_Memory * 2)(self._memory(layer.short_term), self._memory(layer.long_term))
        return _Layer(
            self._exact(layer.memory_norm), self._exact(layer.persistent_norm), self._address(layer.out),
            self._address(layer.gate), self._address(layer.up), self._address(layer.down), memories,
        )

    def _memory(self, memory: MemoryWeights) -> ctypes.Structure:
        matrices = (memory.key, memory.value, memory.gate, memory.decay)
        scalars = (memory.mix, memory.scale, memory.base, memory.slope, memory.exponent)
        fields = _Memory(*map(self._address, matrices), *map(self._exact, scalars))
        fields.window, fields.delay = memory.window or 0, memory.delay
        return fields

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _exact(self, tensor: Tensor) -> int:
        return self._address(tensor.detach().float().contiguous())

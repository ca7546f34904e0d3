"""linear in C: products of many rows, forward and backward, of fp32 or of fp32 rounded to bf16."""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mmcore.kernels import dispatch, native, registry
from mmcore.kernels.layout import FLOATS, rows_of
from mmcore.kernels.thin_linear.cpu import FORMATS

_ADDRESS, _INT = ctypes.c_void_p, ctypes.c_int64
_C = native.functions(
    Path(__file__).with_name("cpu.c"),
    mm_linear=[ctypes.c_char_p, _INT, ctypes.c_int, _ADDRESS, *[_INT] * 3, *[ctypes.c_int] * 2, _ADDRESS, ctypes.c_int],
    mm_linear_depth=(_INT, [ctypes.c_int]),
    mm_linear_scratch=(_INT, [_INT] * 2 + [ctypes.c_int] * 2),
    mm_linear_rounds=(ctypes.c_int, []),
)
_BACKWARD = native.functions(
    Path(__file__).with_name("cpu_backward.c"),
    mm_linear_backward=[
        ctypes.c_int, ctypes.c_char_p, _INT, ctypes.c_int, *[_ADDRESS] * 2, *[_INT] * 3, *[ctypes.c_int] * 2, _ADDRESS,
        ctypes.c_int,
    ],
    mm_linear_backward_scratch=(_INT, [_INT] + [ctypes.c_int] * 2),
)
_MATRIX = struct.Struct("4P2q").pack
"""struct matrix of linear_call.h: weight, scale, y, grad, out, y_row."""

_INPUT, _WEIGHTS, _MORE_WEIGHTS = range(3)

_ROUNDED = 3
"""What FORMATS counts, and beyond them fp32 that is rounded for its products."""

_FLOPS_OF_A_THREAD = 1 << 19
"""Multiply-adds below which a second thread costs more than it brings."""


def why_not(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None) -> str | None:
    """The reason why the C products cannot take these tensors, or None."""
    kind = weights[0].dtype
    rounded = x.dtype is torch.bfloat16 and kind is torch.float32 and rounding()
    if not (x.dtype is torch.float32 or rounded) or kind not in FORMATS or any(w.dtype is not kind for w in weights):
        return f"x is {x.dtype} and a weight {kind}; it takes torch.float32 and weights of one of its formats"
    if (scales is not None) != (kind is torch.int8):
        return "int8 weights, and no others, have scales"
    if scales is not None and any(s.dtype is not torch.float32 or not s.is_contiguous() for s in scales):
        return "the scales are no contiguous fp32 tensors"
    if kind is not torch.float32 and (registry.watched() or (torch.is_grad_enabled() and x.requires_grad)):
        return f"gradients and traced calls want weights of torch.float32, and these are {kind}"
    if torch.is_autocast_enabled("cpu") and not (rounding() and kind is torch.float32):
        return "autocast is on, and products are to be in its dtype"
    return None


@torch.compiler.assume_constant_result
def multiplies_bf16() -> bool:
    """Whether this processor has products of bf16 that are faster than fp32's: a matrix unit (AMX), or AMD's AVX512-BF16."""
    return _multiplies_bf16()


@functools.cache
def _multiplies_bf16() -> bool:
    return dispatch.refusal("cpu", torch.device("cpu")) is None and bool(_C.mm_linear_rounds())


def rounding() -> bool:
    """Whether autocast asks for bf16 and products can have it: operands are rounded, and results stay fp32."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return autocast and multiplies_bf16()


def _threads(rows: int, total: int, inside: int) -> int:
    return max(1, min(torch.get_num_threads(), rows * total * inside // _FLOPS_OF_A_THREAD))


def _backward(work: int, list_: bytes, outs: Sequence[int], x: Tensor, x_row: int, halves: bool, weight_format: int) -> None:
    """`x` [rows, in], rows `x_row` numbers apart, is X, or dX, which is written. `halves`: dY is bf16."""
    rows, inside = x.shape
    threads = _threads(rows, sum(outs), inside)
    scratch = torch.empty(_BACKWARD.mm_linear_backward_scratch(inside, weight_format, threads), **FLOATS)
    _BACKWARD.mm_linear_backward(
        work, list_, len(outs), weight_format, x.data_ptr(), x.data_ptr(), rows, inside, x_row, _is_bf16(x), halves,
        scratch.data_ptr(), threads,
    )  # fmt: skip


def _is_bf16(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16


def _list(outs: Sequence[int], ys: Sequence[tuple[int, int]], weights: Sequence[Tensor] | None = None,
          scales: Sequence[Tensor] | None = None, grads: Sequence[Tensor] | None = None) -> bytes:  # fmt: skip
    """struct matrix for each weight; `ys` are addresses and distances from row to row. The tensors must outlive it."""
    at = [[0] * len(outs) if tensors is None else [t.data_ptr() for t in tensors] for tensors in (weights, scales, grads)]
    places = zip(*at, ys, outs, strict=True)
    return b"".join([_MATRIX(weight, scale, y, grad, out, row) for weight, scale, grad, (y, row), out in places])


def products(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None = None, out: Tensor | None = None,
    rounded: bool = False, narrow: bool = False,
) -> list[Tensor]:
    """y_i [..., out_i] = x W_i^T without gradients: x [..., in] fp32, weights contiguous and all of one of FORMATS, int8
    with `scales` [out_i]. `out`, contiguous, takes the product of a single weight. `rounded`: both are fp32, x may be bf16,
    and they meet rounded to bf16; `narrow`: so are the results."""
    x, row = rows_of(x)
    *leading, inside = x.shape
    outs = [weight.shape[0] for weight in weights]
    format_ = _ROUNDED if rounded else FORMATS[weights[0].dtype]
    halves = narrow and inside <= _C.mm_linear_depth(format_)  # else sums go on from round to round, in fp32
    ys = [torch.empty(*leading, n, dtype=_dtype(halves), device="cpu") for n in outs] if out is None else [out]
    if x.numel() == 0:
        return [y.zero_().to(_dtype(narrow)) for y in ys]
    weights = [weight.contiguous() for weight in weights]
    places = [(y.data_ptr(), columns) for y, columns in zip(ys, outs, strict=True)]
    list_ = _list(outs, places, weights, scales)
    rows = x.numel() // inside
    threads = _threads(rows, sum(outs), inside)
    scratch = torch.empty(_C.mm_linear_scratch(rows, inside, format_, threads), **FLOATS)
    _C.mm_linear(
        list_, len(outs), format_, x.data_ptr(), rows, inside, row, _is_bf16(x), halves, scratch.data_ptr(), threads
    )
    return [y.to(torch.bfloat16) for y in ys] if narrow and not halves else ys


def _dtype(halves: bool) -> torch.dtype:
    return torch.bfloat16 if halves else torch.float32


def input_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor], out: Tensor, rounded: bool = False) -> Tensor:
    """out [rows, in], contiguous, becomes the sum of dY_i W_i; each dY [rows, out_i] with rows of its own distance, all of
    one dtype. Where operands are `rounded` it and `out` may be bf16."""
    weights, outs = [weight.contiguous() for weight in weights], [weight.shape[0] for weight in weights]
    if _is_bf16(out) and sum(outs) > _C.mm_linear_depth(_ROUNDED):
        return out.copy_(input_gradient(grads, weights, torch.empty(out.shape, **FLOATS), rounded))
    list_ = _list(outs, [(g.data_ptr(), g.stride(0)) for g in grads], weights)
    _backward(_INPUT, list_, outs, out, out.shape[1], _is_bf16(grads[0]), _format(rounded))
    return out


def _format(rounded: bool) -> int:
    return _ROUNDED if rounded else FORMATS[torch.float32]


def weight_gradients(
    grads: Sequence[Tensor], x: Tensor, outs: Sequence[Tensor], add: bool = False, rounded: bool = False
) -> Sequence[Tensor]:
    """outs [out_i, in], contiguous, become dY_i^T x, or have it added to them. x [..., in]."""
    x, counts = _flat(x), [out.shape[0] for out in outs]
    list_ = _list(counts, [(g.data_ptr(), g.stride(0)) for g in grads], grads=outs)
    _backward(_MORE_WEIGHTS if add else _WEIGHTS, list_, counts, x, x.stride(0), _is_bf16(grads[0]), _format(rounded))
    return outs


def _flat(x: Tensor) -> Tensor:
    """[..., n] as [rows, n], rows evenly spaced."""
    x, row = rows_of(x)
    return x.as_strided((x.numel() // max(1, x.shape[-1]), x.shape[-1]), (row, 1))


def _run(x, weights, rounded: bool, narrow: bool):
    return products(x, weights, rounded=rounded, narrow=narrow)


def _fake(x, weights, rounded, narrow):
    return [x.new_empty(*x.shape[:-1], weight.shape[0], dtype=_dtype(narrow)) for weight in weights]


def _keep(ctx, inputs, output):
    x, weights, ctx.rounded, ctx.dtype = *inputs[:3], output[0].dtype
    ctx.save_for_backward(x, *weights)


def _gradients(ctx, grads):
    x, *weights = ctx.saved_tensors
    grads = [
        x.new_zeros(*x.shape[:-1], len(w), dtype=ctx.dtype) if g is None else g for g, w in zip(grads, weights, strict=True)
    ]
    for_x, for_weights, *_ = ctx.needs_input_grad
    grad_x, grad_weights = _linear_backward(grads, x, weights, for_x, any(for_weights), ctx.rounded)
    grad_weights = [g if need else None for g, need in zip(grad_weights or [None] * len(weights), for_weights, strict=True)]
    return grad_x if for_x else None, grad_weights, None, None


def _run_backward(grads, x, weights, for_x: bool, for_weights: bool, rounded: bool):
    grad_x = torch.empty(x.shape if for_x else 0, dtype=x.dtype, device="cpu")
    grad_weights = [torch.empty(w.shape, **FLOATS) for w in weights] if for_weights else []
    if x.numel() == 0:
        return grad_x, [g.zero_() for g in grad_weights]
    grads = [_flat(g) for g in grads]
    if for_x:
        input_gradient(grads, weights, grad_x.view(-1, x.shape[-1]), rounded)
    if for_weights:
        weight_gradients(grads, x, grad_weights, rounded=rounded)
    return grad_x, grad_weights


def _fake_backward(grads, x, weights, for_x, for_weights, rounded):
    return x.new_empty(x.shape if for_x else 0), [w.new_empty(w.shape) for w in weights] if for_weights else []


_linear = registry.operator(
    "linear_cpu(Tensor x, Tensor[] weights, bool rounded, bool narrow) -> Tensor[]", _run, _fake, keep=_keep,
    backward=_gradients,
)  # fmt: skip
_linear_backward = registry.operator(
    "linear_cpu_backward(Tensor[] grads, Tensor x, Tensor[] weights, bool for_x, bool for_weights, bool rounded) -> "
    "(Tensor, Tensor[])",
    _run_backward, _fake_backward,
)  # fmt: skip


def _forward_flops(x_shape, weight_shapes, *_, **__) -> int:
    """For torch's FlopCounterMode, which knows the library's products alone."""
    return 2 * math.prod(x_shape[:-1]) * sum(math.prod(shape) for shape in weight_shapes)


def _backward_flops(grads, x_shape, weight_shapes, for_x: bool, for_weights: bool, *_, **__) -> int:
    return (for_x + for_weights) * _forward_flops(x_shape, weight_shapes)


register_flop_formula(torch.ops.mm.linear_cpu)(_forward_flops)
register_flop_formula(torch.ops.mm.linear_cpu_backward)(_backward_flops)


def linear(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor] | None = None, narrow: bool = False
) -> list[Tensor]:
    """See `mmcore.kernels.linear.linear`."""
    rounded = rounding() and weights[0].dtype is torch.float32
    if registry.direct(x) or weights[0].dtype is not torch.float32:
        return products(x, weights, scales, rounded=rounded, narrow=narrow and rounded)
    return _linear(x, list(weights), rounded, narrow and rounded)

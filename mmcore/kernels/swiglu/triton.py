"""SwiGLU in Triton, for eager runs: one pass over memory each way. torch.compile is given the definition instead and
makes the same pass, with what stands before and after it in the same kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import registry, tuning
from mmcore.kernels.layout import rows_of
from mmcore.kernels.swiglu.blocked import _fake, _fake_backward, _keep

BLOCK = 64 if tuning.INTERPRETED else 1024


@triton.jit
def _forward_kernel(gate, up, out, size, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    g = tl.load(gate + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, gate, up, grad_gate, grad_up, size, grad_row, gate_row, up_row, BLOCK: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    upstream = tl.load(grad + row * grad_row + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    for_gate = upstream * u * (sigmoid + silu * (1 - sigmoid))
    tl.store(grad_gate + row * size + columns, for_gate.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + row * size + columns, (upstream * silu).to(grad_up.dtype.element_ty), mask=inside)


_CONFIG = [triton.Config({"BLOCK": BLOCK}, num_warps=4, num_stages=1)]
_FORWARD, _BACKWARD = tuning.Tuned(_forward_kernel, _CONFIG, ()), tuning.Tuned(_backward_kernel, _CONFIG, ())
ROWS = 65_535  # the most programs in a grid's second direction


def _launch(kernel: tuning.Tuned, inputs: list[tuple[Tensor, int]], outputs: list[Tensor]) -> None:
    """Run over all rows, as many at a time as a grid takes."""
    size = outputs[0].shape[-1]
    outputs = [out.view(-1, size) for out in outputs]
    count = len(outputs[0]) if size else 0
    flat = [x.as_strided((count, size), (row, 1)) for x, row in inputs]
    for begin in range(0, count, ROWS):
        rows = slice(begin, min(begin + ROWS, count))
        kernel(
            (triton.cdiv(size, BLOCK), rows.stop - begin), *(x[rows] for x in flat), *(out[rows] for out in outputs),
            size, *(row for _, row in inputs), on=outputs[0],
        )  # fmt: skip


def _run(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    """`out`, where it is given, is contiguous, of whichever dtype."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    _launch(_FORWARD, [rows_of(gate), rows_of(up)], [out])
    return out


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grads = [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2)]
    _launch(_BACKWARD, [rows_of(x) for x in (grad, gate, up)], grads)
    return tuple(grads)


def _gradients(ctx, grad):
    return _gated_backward(grad, *ctx.saved_tensors)


_gated = registry.operator(
    "swiglu_triton(Tensor gate, Tensor up) -> Tensor", _run, _fake, keep=_keep, backward=_gradients
)
_gated_backward = registry.operator(
    "swiglu_triton_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)", _run_backward, _fake_backward
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `mmcore.kernels.swiglu.swiglu`. Raises ConfigError for fp64, which would be rounded."""
    if gate.dtype is torch.float64:
        raise ConfigError("swiglu computes in fp32 as 'triton': use implementation='blocked' for fp64")
    return _run(gate, up) if registry.direct(gate) else _gated(gate, up)

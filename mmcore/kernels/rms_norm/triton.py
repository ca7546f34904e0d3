"""RMSNorm in Triton, for eager runs: one pass over memory each way. torch.compile is given the definition instead,
which it fuses with the addition and the conversion before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import registry, tuning
from mmcore.kernels.layout import rows_of


@triton.jit
def _forward_kernel(x, weight, y, rstds, size, x_row, eps, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    inside = columns < size
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0)
    wide = values.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    quotient = (wide * rstd).to(values.dtype).to(tl.float32)  # rounded before the weight, as the definition has it
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + columns, (quotient * w).to(y.dtype.element_ty), mask=inside)
    tl.store(rstds + row, rstd)


@triton.jit
def _backward_kernel(
    grad, x, weight, rstds, grad_x, partial, count, size, grad_row, x_row, each, D: tl.constexpr
):
    """`each` rows a program, one after the other, so that the weight's gradient is summed in registers."""
    program = tl.program_id(0)
    columns = tl.arange(0, D)
    inside = columns < size
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([D], tl.float32)
    for n in range(0, each):
        row = program.to(tl.int64) * each + n
        there = columns < tl.where(row < count, size, 0)
        upstream = tl.load(grad + row * grad_row + columns, mask=there, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + row, mask=row < count, other=0.0)
        quotient = tl.load(x + row * x_row + columns, mask=there, other=0.0).to(tl.float32) * rstd
        total += upstream * quotient
        for_quotient = upstream * w
        along = tl.sum(for_quotient * quotient, 0) / size
        result = (for_quotient - quotient * along) * rstd
        tl.store(grad_x + row * size + columns, result.to(grad_x.dtype.element_ty), mask=there)
    tl.store(partial + program.to(tl.int64) * size + columns, total, mask=inside)


def _warps(width: int) -> list[triton.Config]:
    return [triton.Config({}, num_warps=max(1, min(16, width // 256)), num_stages=1)]


def _tuned(kernel, width: int) -> tuning.Tuned:
    if (kernel, width) not in _KERNELS:
        _KERNELS[kernel, width] = tuning.Tuned(kernel, _warps(width), ())
    return _KERNELS[kernel, width]


_KERNELS: dict = {}


def _run(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(y, in `dtype` where it is given, and 1 / sqrt(mean(x^2) + eps) of each row)."""
    dtype = dtype or torch.promote_types(x.dtype, weight.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        x, row = rows_of(x)
        size = x.shape[-1]
        width = triton.next_power_of_2(size)
        _tuned(_forward_kernel, width)(
            (rstd.numel(),), x, weight.contiguous(), y, rstd, size, row, eps, on=x, D=width
        )
    return y, rstd


def _fake(x, weight, eps):
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    return y, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _gradients(ctx, grad, _):
    return *_norm_backward(grad, *ctx.saved_tensors), None


def _run_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return grad_x, torch.zeros_like(weight)
    grad, grad_row = rows_of(grad)
    x, x_row = rows_of(x)
    count, size = rstd.numel(), x.shape[-1]
    width = triton.next_power_of_2(size)
    each = triton.cdiv(count, 4 * tuning.processors(x))
    programs = triton.cdiv(count, each)
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    _tuned(_backward_kernel, width)(
        (programs,), grad, x, weight.contiguous(), rstd, grad_x, partial, count, size, grad_row, x_row, each, on=x, D=width
    )
    return grad_x, partial.sum(0).to(weight.dtype)


def _fake_backward(grad, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_norm = registry.operator(
    "rms_norm_triton(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _run, _fake, keep=_keep, backward=_gradients,
)  # fmt: skip
_norm_backward = registry.operator(
    "rms_norm_triton_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _run_backward, _fake_backward,
)  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `mmcore.kernels.rms_norm.rms_norm`. Raises ConfigError for fp64, which would be rounded."""
    if torch.float64 in (x.dtype, weight.dtype):
        raise ConfigError("rms_norm computes in fp32 as 'triton': use implementation='blocked' for fp64")
    return (_run if registry.direct(x) else _norm)(x, weight, eps)[0]

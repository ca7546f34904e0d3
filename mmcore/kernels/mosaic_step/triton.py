"""The step in Triton: five launches a layer for one row, and thirteen, products by the library, for more.

    projected = [k~ v~ | k~ v~ | gates decays](RMSNorm(x))      product_kernel, NORM
    pairs and recurrences go on, read = what the new keys read  read_kernel, both memories
    x += W_o read                                               product_kernel, ADD
    inner = SiLU(W_1 y) * W_3 y,  y = RMSNorm(x)                product_kernel, NORM and GATED
    x += W_2 inner                                              product_kernel, ADD

Layer by layer through PyTorch a step of 24 layers takes 1,930 launches: on an H100 5.7 ms as a CUDA graph, 3.5 of them in
kernels that do next to nothing, and 84 ms as calls. x and all sums are fp32. Nothing that changes from token to token is an
argument: the number of pairs is the memories' `clock`, which the step itself moves on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmcore.kernels import tuning
from mmcore.kernels.memory_read.triton_few import FEW, share_count
from mmcore.kernels.memory_read.triton_parts import dot_precision
from mmcore.kernels.mosaic_step.triton_kernels import (
    JOB,
    MEMORY,
    ROWS,
    product_kernel,
    read_kernel,
)  # fmt: skip
from mmcore.kernels.rms_norm import triton as rms_norm
from mmcore.kernels.swiglu import triton as swiglu

if TYPE_CHECKING:
    from mmcore.kernels.mosaic_step import LayerWeights, Matrix, MemoryWeights

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8}
_ALL = 1 << 30  # the window of a memory without one
MOST_ROWS = 64  # of x that a program takes


def why_not(matrices: Sequence[Matrix]) -> str | None:
    """The reason why these weights cannot take the step in Triton, or None."""
    for matrix in matrices:
        weight = matrix.weight
        if type(weight) not in (Tensor, torch.nn.Parameter):
            return f"the weights are {type(weight).__name__}s, which have no one address"
        if weight.dtype not in _TYPES or (weight.dtype is torch.int8) != (matrix.scale is not None):
            return f"the weights are {weight.dtype}"
        if not weight.is_contiguous() or weight.data_ptr() % 16:
            return "the weights are not contiguous tensors that begin at multiples of 16 bytes"
        if weight.device.type != "cuda" and not tuning.INTERPRETED:
            return f"Triton kernels need a CUDA device, and the weights are on {weight.device}"
    return None


def _configs(rows: int, wide: bool) -> list[triton.Config]:
    """N rows of W, more where `wide`, and K columns a program and turn. One configuration: a conversation's first token
    waits for it."""
    if tuning.INTERPRETED:
        table = {"N": 64, "K": 64, "STAGES": 1}
    elif rows == 1:
        table = {"N": 8 if wide else 4, "K": 1024, "STAGES": 3}
    else:
        table = {"N": 64, "K": 64, "STAGES": 4}
    return [triton.Config(table, num_warps=4, num_stages=1)]


class _Products:
    """The products of one input with matrices [out, in], one under the other, or, gated, with one pair of matrices."""

    def __init__(self, groups: Sequence[tuple[Matrix, ...]], norm: Tensor | None = None) -> None:
        # Detached: a weight that is replaced must not be freed while addresses point to it.
        self.norm = None if norm is None else norm.detach()
        self._groups = groups = [
            tuple(matrix._replace(weight=matrix.weight.detach()) for matrix in group) for group in groups
        ]
        first = groups[0][0]
        self._type, self._scaled, self._gated = first.weight.dtype, first.scale is not None, len(groups[0]) == 2
        self._width = first.weight.shape[1]
        counts = [group[0].weight.shape[0] for group in groups]
        self._begins = [sum(counts[:n]) for n in range(len(groups))]
        self.columns = sum(counts)
        jobs = [self._jobs(group, begin) for group, begin in zip(groups, self._begins, strict=True)]
        self._all = self._table(jobs)
        thin = [job for count, job in zip(counts, jobs, strict=True) if count < ROWS.value]
        self._thin = self._table(thin) if thin else None
        self._tuned: dict[int, tuning.Tuned] = {}

    @staticmethod
    def _jobs(group: tuple[Matrix, ...], column: int) -> Tensor:
        """Blocks of at most ROWS rows, as `product_kernel` finds them, on the CPU."""
        count = len(group[0].weight)
        firsts = torch.arange(0, count, ROWS.value, device="cpu")
        jobs = torch.zeros(len(firsts), JOB.value, dtype=torch.int64, device="cpu")
        for place, (weight, scale) in enumerate(group):
            jobs[:, 2 * place] = weight.data_ptr() + firsts * (weight.stride(0) * weight.element_size())
            jobs[:, 2 * place + 1] = 0 if scale is None else scale.data_ptr() + firsts * scale.element_size()
        jobs[:, 4], jobs[:, 5] = column + firsts, (count - firsts).clamp(max=ROWS.value)
        return jobs

    def _table(self, jobs: list[Tensor]) -> Tensor:
        return torch.cat(jobs).to(self._groups[0][0].weight.device)

    def __call__(self, x: Tensor, out: Tensor, narrow: torch.dtype, eps: float = 0.0, add: bool = False) -> None:
        """out [B, columns] = the products with x [B, width]. Several rows meet int8 weights in `narrow`."""
        narrow = narrow if self._scaled else self._type
        if len(x) == 1:
            self._launch(self._all, x, out, narrow, eps, add, self.norm)
            return
        # The norm goes first, for unnormalized activations may be too large for fp16.
        y = x.to(narrow) if self.norm is None else rms_norm._run(x, self.norm, eps, narrow)[0]
        library = self._type is torch.float32 or (x.is_cuda and torch.version.hip is None)
        if library and not self._scaled:
            self._by_library(y, out, add)
        else:
            self._launch(self._all, y, out, narrow, eps, add, None)

    def _launch(
        self, jobs: Tensor, x: Tensor, out: Tensor, narrow: torch.dtype, eps: float, add: bool, norm: Tensor | None
    ) -> None:
        rows = len(x)
        block = self.block(rows)
        if block not in self._tuned:
            # Rows of int8 are short; a pair of matrices has not the registers.
            wide = self._scaled and not self._gated
            self._tuned[block] = tuning.Tuned(product_kernel, _configs(block, wide), ())
        self._tuned[block](
            lambda meta: (len(jobs) * (ROWS.value // meta["N"]), triton.cdiv(rows, block)),
            jobs, x, x if norm is None else norm, out, self._width, rows, x.stride(0), out.stride(0), eps, on=x,
            TYPE=_TYPES[self._type], NARROW=_TYPES[narrow], PRECISION=dot_precision(narrow), NORM=norm is not None,
            GATED=self._gated, ADD=add, SCALED=self._scaled, B=block,
        )  # fmt: skip

    @staticmethod
    def block(rows: int) -> int:
        """Rows of x that a program takes."""
        return 1 if rows == 1 else min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))

    def _by_library(self, y: Tensor, out: Tensor, add: bool) -> None:
        """For several rows the library's products are faster than tiles of ours: 8 and 32 rows of the 1.5b shape took 0.09
        ms a layer on an H100, ours 0.14 and 0.16. One row takes 0.09 either way, ours in one launch for eight."""
        if self._gated:
            halves = y.new_empty(2, *out.shape, dtype=torch.float32)
            for half, matrix in zip(halves, self._groups[0], strict=True):
                _product(y, matrix.weight, half, False)
            swiglu._run(*halves, out)
            return
        for begin, (matrix,) in zip(self._begins, self._groups, strict=True):
            rows = len(matrix.weight)
            if rows >= ROWS.value:
                _product(y, matrix.weight, out[:, begin : begin + rows], add)
        if self._thin is not None:
            self._launch(self._thin, y, out, self._type, 0.0, add, None)


def _product(y: Tensor, weight: Tensor, out: Tensor, add: bool) -> None:
    """out (+)= y weight^T, out fp32."""
    if y.dtype is torch.float32:
        torch.addmm(out, y, weight.T, beta=float(add), out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, y, weight.T, torch.float32, out=out)
    else:
        torch.ops.aten.mm.dtype_out(y, weight.T, torch.float32, out=out)


_READ = {n: tuning.Tuned(read_kernel, [triton.Config({"N": n}, num_warps=4, num_stages=2)], ()) for n in (16, 32, 64)}
"""By the pairs that are read at a time. With 64 and three programs for each multiprocessor it was the fastest of nine
configurations after 4,096 and 32,768 tokens of one row, with eight after 4,096 of 32; wide heads in fp32 would not fit into
shared memory."""


class _Layer:
    """One layer's products, and its memories' numbers."""

    def __init__(self, weights: LayerWeights) -> None:
        memories = (weights.short_term, weights.long_term)
        wide = [matrix for memory in memories for matrix in (memory.key, memory.value)]
        thin = [matrix for memory in memories for matrix in (memory.gate, memory.decay)]
        self.project = _Products([(matrix,) for matrix in (*wide, *thin)], weights.memory_norm)
        self.out = _Products([(weights.out,)])
        self.inner = _Products([(weights.gate, weights.up)], weights.persistent_norm)
        self.down = _Products([(weights.down,)])
        self.numbers = [self._numbers(memory) for memory in memories]

    @staticmethod
    def _numbers(memory: MemoryWeights) -> tuple[list[Tensor], int, int]:
        """([mix, scale, base, slope, exponent], window, delay)."""
        scalars = (memory.mix, memory.scale, memory.base, memory.slope, memory.exponent)
        return [part.detach().float().contiguous() for part in scalars], memory.window or _ALL, memory.delay


class Step:
    """`step(x) -> logits` of the states that it was bound to. `x`, embeddings [B, 1, d], becomes fp32 logits [B, V]."""

    def __init__(self, layers: Sequence[LayerWeights], norm: Tensor, classifier: Matrix, heads: int, eps: float) -> None:
        self._layers = [_Layer(layer) for layer in layers]
        self._classify = _Products([(classifier,)], norm)
        self._heads, self._eps = heads, eps

    def bind(self, memories: Sequence[Any], fixed: Sequence[Any], starts: Tensor | None) -> None:
        """The next steps go on from `fixed`, the tensors of the layers' short-term and long-term memories in turn, which are
        contiguous and written in place, and from the stores of `memories`. `starts`, int32 [memories, B], is the slot of
        each row's first pair, and may change."""
        rows = []
        numbers = [number for layer in self._layers for number in layer.numbers]
        for memory, own, (scalars, window, delay) in zip(memories, fixed, numbers, strict=True):
            keys, values = memory.store.keys, memory.store.values
            parts = (own.log_scale, own.vector, own.key, own.raw, keys, values, own.clock, *scalars)
            rows.append([*(part.data_ptr() for part in parts), keys.stride(0), window, delay, memory.store.lent])
        self._fixed = fixed  # what addresses point to must live as long as they
        store = memories[0].store.keys
        table = torch.tensor(rows, dtype=torch.int64, device=store.device)
        self._memories = table.view(len(self._layers), 2, MEMORY.value)
        self._starts = None if starts is None else starts.view(len(self._layers), 2, -1)
        batch, _, heads, self._size = store.shape
        self._types = {"PAIRS": _TYPES[store.dtype], "WAITING": _TYPES[fixed[0].key.dtype]}
        self._precision, self._item = dot_precision(store.dtype), store.element_size()
        self._aligned = heads * self._size * store.element_size() % 16 == 0
        programs = 3 if 2 * batch * heads < tuning.processors(store) else 8
        self._shares = [share_count(batch * heads, self._reach(memory), store, programs, 64) for memory in memories[:2]]
        self._arrivals = torch.zeros(2, batch * heads + 1, dtype=torch.int32, device=store.device)

    @staticmethod
    def _reach(memory: Any) -> int:
        capacity, window = memory.store.keys.shape[1], memory.store.window
        return capacity if window is None else min(capacity, window)

    def __call__(self, x_B1d: Tensor) -> Tensor:
        narrow = x_B1d.dtype
        x = x_B1d[:, 0].to(torch.float32, copy=True).contiguous()
        batch, width = x.shape
        heads, size = batch * self._heads, self._size
        layer = self._layers[0]
        projected = x.new_empty(batch, layer.project.columns)
        read = x.new_empty(batch, 2 * width, dtype=narrow)
        inner = x.new_empty(batch, layer.inner.columns, dtype=narrow)
        short, shares = self._shares[0], sum(self._shares)
        sums, totals, tops = x.new_empty(heads, shares, size), *x.new_empty(2, heads, shares)
        padded = max(16, triton.next_power_of_2(size))
        read_pairs = _READ[16 if tuning.INTERPRETED else 32 if padded * self._item > 512 else 64]
        for depth, layer in enumerate(self._layers):
            memories = self._memories[depth]
            layer.project(x, projected, narrow, self._eps)
            starts = memories if self._starts is None else self._starts[depth]
            read_pairs(
                (shares, heads), memories, projected, starts, sums, totals, tops, self._arrivals, read,
                self._heads, size, short, projected.stride(0), on=x, PRECISION=self._precision, EVEN=padded == size,
                ALIGNED=self._aligned, D=padded, M=FEW, S=triton.next_power_of_2(max(self._shares)),
                STARTS=self._starts is not None, **self._types,
            )  # fmt: skip
            layer.out(read, x, narrow, add=True)
            layer.inner(x, inner, narrow, self._eps)
            layer.down(inner, x, narrow, add=True)
        logits = x.new_empty(batch, self._classify.columns)
        self._classify(x, logits, narrow, self._eps)
        return logits


"""Reading a memory of key-value pairs by kernel smoothing: equations (4), (6) and (10)."""

from __future__ import annotations

import torch
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.kernels import dispatch, registry
from mmcore.kernels.memory_read import blocked, cpu, reference


def _triton(*arguments):
    """Imported with its first use: Triton takes half a second."""
    from mmcore.kernels.memory_read import triton

    return triton.memory_read(*arguments)


# In order of preference. The C form holds its tiles in fp32, the Triton form 16-bit numbers or fp32; what they do not
# take goes to the PyTorch blocks.
FORMS = {"cpu": cpu.memory_read, "triton": _triton, "blocked": blocked.memory_read, "reference": reference.memory_read}
_HALF = {name: form for name, form in FORMS.items() if name != "cpu"}
_DOUBLE = {name: form for name, form in _HALF.items() if name != "triton"}


def memory_read(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bandwidth_base: Tensor,
    bandwidth_slope: Tensor,
    bandwidth_exponent: Tensor,
    *,
    starts: Tensor | None = None,
    window: int | None = None,
    delay: int = 1,
    offset: int = 0,
    implementation: str = "auto",
) -> Tensor:
    """What each query finds in its memory: `sum_j softmax_j(beta q.k_j) v_j` over the pairs j it may read.

    Query i of row b stands at position p = offset + i and reads the pairs lo <= j <= hi with hi = p - delay
    (at most Tk - 1) and lo = max(starts[b, i], p - window + 1). With n = hi - lo + 1 such pairs, the bandwidth of
    head h is `beta = bandwidth_slope[h] * n ** bandwidth_exponent[h] + bandwidth_base[h]` (equation 6). A query
    that reads nothing (n = 0) gets zeros and sends no gradient. `window=256, delay=1` is the short-term memory of
    equation (10), `window=None, delay=m` the long-term one.

    Args:
        queries: [B, Tq, H, D].
        keys, values: [B, Tk, H, D], of the queries' dtype, or fp16 under fp32 queries without gradients: widened, on
            a CPU as they are read, and values of many queries rounded to bf16 where it multiplies that. Any strides: slices
            of a larger store are read in place. `keys` may be the very tensor `queries`; both gradients then add up.
        bandwidth_base, bandwidth_slope, bandwidth_exponent: [H], beta_0, beta_1 and alpha of each head.
        starts: int32 [B, Tq], the first position that a query may read (the start of its document, or the
            number of padding positions on its left); None means 0.
        window: positions back that a query sees, its own included; None means all.
        delay: how many positions the newest pair lies behind the query; 0 reads its own pair too, as attention does.
        offset: the position of query 0; 0 in training, the pairs already stored in decoding.
        implementation: auto, cpu (C, fp32), triton (GPUs, 16 bits or fp32), blocked (PyTorch, any device and dtype,
            no Tq x Tk matrix), or reference (the definition, Tq x Tk).

    Returns:
        [B, Tq, H, D], in the queries' dtype. Scores, softmax and sums are fp32 (fp64 for fp64 tensors), under
            autocast too.

    Raises:
        ConfigError: the shapes or dtypes do not fit together, or the implementation's name is unknown.
        HardwareError: the implementation asked for cannot run here.
    """
    q_shape, k_shape = queries.shape, keys.shape
    fit = len(q_shape) == len(k_shape) == 4 and k_shape == values.shape
    # number by number: slices of a torch.Size take 1 us, and a decoder comes here twice a layer for each token
    if not fit or q_shape[0] != k_shape[0] or q_shape[2] != k_shape[2] or q_shape[3] != k_shape[3]:
        raise ConfigError(
            f"memory_read got queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values "
            f"{tuple(values.shape)}: give [B, Tq, H, D] and twice [B, Tk, H, D]"
        )
    narrow = keys.dtype is torch.float16 and queries.dtype is torch.float32 and not torch.is_grad_enabled()
    if not keys.dtype == values.dtype or not (narrow or queries.dtype == keys.dtype):
        raise ConfigError(
            f"memory_read got {queries.dtype} queries, {keys.dtype} keys and {values.dtype} values: "
            f"convert them to one dtype"
        )
    if delay < 0 or offset < 0 or (window is not None and window < 1):
        raise ConfigError(
            f"memory_read got delay {delay}, offset {offset} and window {window}: window must be at least 1, "
            f"delay and offset at least 0"
        )
    if starts is not None and starts.shape != q_shape[:2]:
        raise ConfigError(
            f"memory_read got starts {tuple(starts.shape)} for queries {tuple(queries.shape)}: give one start for "
            f"each query, [B, Tq]"
        )
    forms = FORMS
    if implementation == "auto" and queries.dtype is not torch.float32:
        forms = _DOUBLE if queries.dtype is torch.float64 else _HALF
    read = dispatch.choose("memory_read", forms, implementation, queries.device)
    if narrow and not (read is cpu.memory_read and registry.direct(queries)):
        keys, values = keys.float(), values.float()
    return read(
        queries, keys, values, bandwidth_base, bandwidth_slope, bandwidth_exponent, starts, window, delay, offset
    )

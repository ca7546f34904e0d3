"""The kernels of a GPU beside the bandwidth of a copy and beside the rivals that can be had (parts b, v, c, d, g)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.kernels.gated_scan import gated_scan
from mmcore.kernels.linear_cross_entropy import linear_cross_entropy
from mmcore.kernels.look_ahead import look_ahead
from mmcore.kernels.memory_read import memory_read
from mmcore.kernels.rms_norm import rms_norm
from mmcore.kernels.swiglu import swiglu
from tests.benchmarks.gpu_timing import Place, attempt, backward_seconds, copy_bandwidth, seconds

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCANS = [((8, 4096, 32, 128), "bf16"), ((8, 4096, 32, 128), "fp32"), ((1, 32_768, 32, 128), "bf16"),
         ((4, 4096, 16, 128), "bf16")]  # fmt: skip
READS = {"short": {"window": 256, "delay": 1}, "long": {"delay": 64}, "causal": {"delay": 0}}
TINY_READS = {"short": {"window": 9, "delay": 1}, "long": {"delay": 5}, "causal": {"delay": 0}}


def scans(place: Place, report: dict[str, Any]) -> None:
    """gated_scan forward and backward: bytes that must move (in and out once) over time, and over a copy's rate."""
    copy = copy_bandwidth(place)
    attempt(report, "copy_gb_s", lambda: copy / 1e9)
    for shape, name in place.pick(SCANS, [((1, 40, 2, 16), "fp32")]):
        attempt(report, f"{','.join(map(str, shape))} {name}", functools.partial(_scan, place, shape, DTYPES[name], copy))
        place.free()


def _scan(place: Place, shape: tuple[int, int, int, int], dtype: torch.dtype, copy: float) -> dict[str, Any]:
    B, T, H, D = shape
    new = functools.partial(torch.randn, device=place.device)
    raw = new(shape).to(dtype).requires_grad_()
    gates = new(B, T, H).to(dtype).requires_grad_()
    decays = (-new(B, T, H).abs()).to(dtype).requires_grad_()
    resets = torch.zeros(B, T, dtype=torch.bool, device=place.device)
    resets[:, :: max(1, T // 4)] = True
    upstream = new(shape).to(dtype)

    def run(form: str) -> Tensor:
        return gated_scan(raw, gates, decays, resets=resets, implementation=form)[0]

    size = raw.element_size()
    numbers, scalars = raw.numel() * size, gates.numel() * size
    bytes_forward, bytes_backward = 2 * numbers + 2 * scalars, 3 * numbers + 4 * scalars
    forward = seconds(place, lambda: run(place.form))
    with torch.no_grad():
        inference = seconds(place, lambda: run(place.form))
    backward = backward_seconds(place, lambda: run(place.form), (raw, gates, decays), upstream)
    found = {
        "forward_ms": forward * 1e3, "without_gradients_ms": inference * 1e3, "backward_ms": backward * 1e3,
        "forward_of_copy": bytes_forward / forward / copy, "backward_of_copy": bytes_backward / backward / copy,
    }
    return found


def small_ones(place: Place, report: dict[str, Any]) -> None:
    """What lies between products and reads of a micro-batch of the 1.5b recipe, beside a copy of the bytes that must move: all
    are bound by memory. A whole training step showed look-ahead's backward pass at half of it."""
    copy = copy_bandwidth(place)
    attempt(report, "copy_gb_s", lambda: copy / 1e9)
    (B, T, H, D), inner = place.pick(((4, 4096, 16, 128), 5632), ((1, 40, 2, 16), 48))
    new = functools.partial(torch.randn, device=place.device)
    dtype = torch.float32 if place.tiny else torch.bfloat16
    values, x, gate, up = (
        new(shape).to(dtype).requires_grad_() for shape in [(B, T, H, D), (B * T, H * D), *[(B * T, inner)] * 2]
    )
    numbers, weight = [new(H).requires_grad_() for _ in range(2)], new(H * D).to(dtype).requires_grad_()
    works = {
        "look_ahead": (lambda: look_ahead(values, *numbers, implementation=place.form), (values, *numbers), 2, 3),
        "rms_norm": (lambda: rms_norm(x, weight, 1e-5, implementation=place.form), (x, weight), 2, 3),
        "swiglu": (lambda: swiglu(gate, up, implementation=place.form), (gate, up), 3, 5),
    }
    for name, (work, leaves, passes, backward_passes) in works.items():

        def timed(work=work, leaves=leaves, passes=passes, backward_passes=backward_passes) -> dict[str, float]:
            moved = leaves[0].numel() * leaves[0].element_size()
            forward = seconds(place, work)
            backward = backward_seconds(place, work, leaves, torch.randn_like(work()))
            return {
                "forward_ms": forward * 1e3, "forward_of_copy": passes * moved / forward / copy,
                "backward_ms": backward * 1e3, "backward_of_copy": backward_passes * moved / backward / copy,
            }

        attempt(report, name, timed)


def scan_rivals(place: Place, report: dict[str, Any]) -> None:
    """flash-linear-attention's HGRN, the nearest recurrence of others: one gate a number, no norm. Its chunked form and
    the recurrent one; trying its configurations out takes it a minute."""
    for shape in [(8, 4096, 32, 128), (4, 4096, 16, 128)] if place.gpu else []:  # its kernels need a card
        attempt(report, ",".join(map(str, shape)), functools.partial(_fla_scan, place, shape))


def _fla_scan(place: Place, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

    B, T, H, D = shape
    dtype = torch.bfloat16
    x = torch.randn(B, T, H * D, device=place.device, dtype=dtype).requires_grad_()
    g = F.logsigmoid(torch.randn_like(x)).detach().requires_grad_()
    found = {}
    for name, form in (("chunk", chunk_hgrn), ("recurrent", fused_recurrent_hgrn)):

        def both(form=form) -> dict[str, float]:
            work = lambda: form(x, g)[0]  # noqa: E731
            return {
                "forward_ms": seconds(place, work) * 1e3,
                "backward_ms": backward_seconds(place, work, (x, g), torch.randn_like(x)) * 1e3,
            }

        attempt(found, f"fla_hgrn_{name}", both)
    return found


def pairs_read(length: int, place: dict[str, int]) -> int:
    """Query-pair products of one head over one document."""
    count = torch.arange(length, dtype=torch.float64) - place["delay"] + 1
    if "window" in place:
        count = count.clamp(max=place["window"] - place["delay"])
    return int(count.clamp(min=0).sum())


def reads(place: Place, report: dict[str, Any]) -> None:
    """memory_read beside SDPA (flash, cuDNN) and compiled FlexAttention with the same mask."""
    shapes = place.pick([(8, 4096, 32, 128), (1, 32_768, 32, 128)], [(1, 40, 1, 16)])
    dtype = torch.float32 if place.tiny else torch.bfloat16
    for B, T, H, D in shapes:
        keys = F.normalize(torch.randn(B, T, H, D, device=place.device), dim=-1).to(dtype).requires_grad_()
        values = torch.randn(B, T, H, D, device=place.device, dtype=dtype).requires_grad_()
        scalars = [torch.full((H,), x, device=place.device).requires_grad_() for x in (4.5, 4.5, 1 / 3)]
        starts = (torch.arange(T, device=place.device) // max(1, T // 4) * (T // 4)).int().expand(B, T).contiguous()
        upstream = torch.randn_like(values)
        title = f"{B},{T},{H},{D}"
        for name, where in place.pick(READS, TINY_READS).items():
            for packed in (False, True) if T < 10_000 else (False,):
                extra = where | ({"starts": starts} if packed else {})

                def run(extra=extra, keys=keys, values=values, scalars=scalars) -> Tensor:
                    return memory_read(keys, keys, values, *scalars, **extra, implementation=place.form)

                products = B * H * D * pairs_read(T, where)
                label = f"{title} {name}{' packed' if packed else ''}"
                work = functools.partial(_attention, place, run, (keys, values, *scalars), upstream, products)
                attempt(report, label, work)
        _rivals(place, report, (B, T, H, D), dtype)
        place.free()


def _attention(
    place: Place, run: Callable[[], Tensor], leaves: tuple[Tensor, ...], upstream: Tensor, products: int
) -> dict[str, float]:
    """Times, and TFLOP/s with two products forward and five backward, as is usual, whatever is computed again."""
    forward = seconds(place, run)
    backward = backward_seconds(place, run, leaves, upstream)
    return {
        "forward_ms": forward * 1e3, "backward_ms": backward * 1e3, "both_ms": (forward + backward) * 1e3,
        "forward_tflops": 4 * products / forward / 1e12, "backward_tflops": 10 * products / backward / 1e12,
    }


def _rivals(place: Place, report: dict[str, Any], shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, T, H, D = shape
    q, k, v = (torch.randn(B, H, T, D, device=place.device, dtype=dtype).requires_grad_() for _ in range(3))
    upstream = torch.randn_like(q)
    title = ",".join(map(str, shape))
    causal = B * H * D * pairs_read(T, {"delay": 0})

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in (backends if place.gpu else {"math": SDPBackend.MATH}).items():
        work = functools.partial(_attention, place, functools.partial(sdpa, backend), (q, k, v), upstream, causal)
        attempt(report, f"{title} sdpa {name}", work)
    if not place.gpu or T > 10_000:  # FlexAttention compiles for minutes on a CPU, and has no backward pass there
        return
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    for name, where in READS.items():
        window = where.get("window", 2 * T)

        def mask(b, h, i, j, window=window, delay=where["delay"]):
            return (j <= i - delay) & (j > i - window)

        blocks = create_block_mask(mask, None, None, T, T, device=place.device)
        run = functools.partial(compiled, q, k, v, block_mask=blocks)
        products = B * H * D * pairs_read(T, where)
        attempt(report, f"{title} flex {name}", functools.partial(_attention, place, run, (q, k, v), upstream, products))


def losses(place: Place, report: dict[str, Any]) -> None:
    """linear_cross_entropy with gradients beside F.cross_entropy, Liger-Kernel and cut-cross-entropy."""
    N, d, V = place.pick((16_384, 2048, 128_256), (40, 16, 101))
    dtype = torch.float32 if place.tiny else torch.bfloat16
    hidden = torch.randn(N, d, device=place.device).to(dtype).requires_grad_()
    weight = (torch.randn(V, d, device=place.device) / d**0.5).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), device=place.device)

    def ours(form: str) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, implementation=form)

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def liger() -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        result = Liger.apply(hidden, weight, labels)
        return result[0] if isinstance(result, tuple) else result

    def cut() -> Tensor:
        from cut_cross_entropy import linear_cross_entropy as cut_loss

        return cut_loss(hidden, weight, labels)

    sides = {"triton": functools.partial(ours, place.form), "blocked": functools.partial(ours, "blocked"),
             "plain": plain, "liger": liger, "cut": cut}  # fmt: skip
    products = 6 * N * d * V
    for name, work in sides.items():

        def timed(work=work) -> dict[str, float]:
            place.free()
            before = place.peak_bytes()
            spent = seconds(place, lambda: torch.autograd.grad(work(), (hidden, weight)))
            return {"ms": spent * 1e3, "tflops": products / spent / 1e12, "extra_gb": (place.peak_bytes() - before) / 1e9}

        attempt(report, name, timed)


def growth(place: Place, report: dict[str, Any]) -> None:
    """Time and memory of one layer, forward and backward, over the context: ours and the transformer's by turns, so that
    both have the same contexts where time is up. Kernels in the first of their configurations: timing them all for each
    context anew took 15 s of a visit."""
    from mmcore.model.documents import Packing

    d = place.pick(2048, 32)
    rows = report.setdefault("rows", [])
    blocks = {kind: _block(place, kind) for kind in ("memory_mosaics_v2", "llama")}
    for context in place.pick([1024 * 2**n for n in range(8)], [16, 32]):
        for kind, block in blocks.items():

            def one(context=context, block=block, kind=kind) -> dict[str, float]:
                place.free()
                x = torch.randn(1, context, d, device=place.device, requires_grad=True)

                def step() -> None:
                    with torch.autocast(place.device.type, torch.bfloat16, enabled=place.gpu):
                        out = block(x, Packing(), 64)
                    out.backward(x.detach())

                with mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: True):  # which Tuned asks
                    spent = seconds(place, step, 0.5)
                row = {"ms": spent * 1e3, "peak_gb": place.peak_bytes() / 1e9}
                rows.append({"kind": kind, "context": context} | row)
                return row

            attempt(report, f"{kind} {context}", one)


def _block(place: Place, kind: str) -> torch.nn.Module:
    """One layer of the 1.5b shape."""
    from mmcore.config import ModelConfig
    from mmcore.model import build_model

    d, H = place.pick((2048, 16), (32, 2))
    config = ModelConfig(
        model_type=kind, vocab_size=64, hidden_size=d, intermediate_size=3 * d, num_hidden_layers=1,
        num_attention_heads=H, short_term_window=place.pick(256, 9),
    )  # fmt: skip
    model = build_model(config, place.form if place.tiny else "auto")
    model.init_weights(0)
    return model.to(place.device).model.layers[0]

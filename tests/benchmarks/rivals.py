"""What users would otherwise pick, written as well as PyTorch allows: litgpt's model, and the strongest known forms of
the two memory kernels without a kernel of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.common import SEED, Shape

CHUNK = 32  # of the gated scan: 16 and 64 were slower
BLOCK = 256  # of the window: its own length


def build_litgpt(shape: Shape, context: int) -> torch.nn.Module:
    """litgpt's GPT in the shape of a Llama, random weights."""
    from litgpt.model import GPT, Config

    config = Config(
        block_size=context, padded_vocab_size=shape.vocab_size, n_layer=shape.layers, n_head=shape.heads,
        n_embd=shape.hidden_size, intermediate_size=shape.intermediate_size, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )
    torch.manual_seed(SEED)
    return GPT(config)


def _chunked_scan(raw: Tensor, gates: Tensor, decays: Tensor) -> Tensor:
    """Unit-norm keys [B, T, H, D] as triangular products in chunks, and one more triangle over the chunks' ends. T must
    be a multiple of CHUNK; no documents, no state."""
    batch, time, heads, size = raw.shape
    number = time // CHUNK

    def chunks(x: Tensor) -> Tensor:
        return x.reshape(batch, number, CHUNK, heads, *x.shape[3:]).movedim(3, 1)

    raw_BHNCD, gates_BHNC, decays_BHNC = chunks(raw), chunks(gates), chunks(decays)
    since = decays_BHNC.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=raw.device).tril()
    logs = (gates_BHNC[..., None, :] + since[..., :, None] - since[..., None, :]).masked_fill(~lower, -math.inf)
    before = since[..., -1].cumsum(-1)  # [B, H, N], up to and with each chunk
    reached = (logs[..., -1, :].amax(-1) - before).cummax(-1).values + before
    entry = F.pad(reached[..., :-1], (1, 0), value=-math.inf)
    top = torch.maximum(logs.amax(-1), since + entry[..., None])
    local = (logs - top[..., None]).exp() @ raw_BHNCD
    ends = local[..., -1, :]
    earlier = torch.ones(number, number, dtype=torch.bool, device=raw.device).tril(-1)
    # what chunk m's own end is worth when chunk n begins, in units of exp(entry_n)
    across = before[..., :, None] - since[..., -1][..., :, None] - before[..., None, :]
    across = (across + top[..., -1][..., None, :] - entry[..., :, None]).masked_fill(~earlier, -math.inf).exp()
    carried = across @ ends
    u = local + (since + entry[..., None] - top).exp()[..., None] * carried[..., None, :]
    keys = u * u.square().sum(-1, keepdim=True).clamp_min(1e-30).rsqrt()
    return keys.movedim(1, 3).reshape(batch, time, heads, size)


chunked_scan = torch.compile(_chunked_scan, dynamic=False)
"""Compiled, with the backward pass that autograd derives."""


class _WindowRead(torch.autograd.Function):
    """Every block of BLOCK queries reads itself and the block before, [B, H, N, D] x 2; weights are made again for the
    backward pass. Queries are keys, one bandwidth a head, pairs t - BLOCK + 1 .. t - 1."""

    @staticmethod
    def forward(ctx, keys: Tensor, values: Tensor, beta: Tensor) -> Tensor:
        out = torch.empty_like(keys)
        for block, reach, mask in _windows(keys.shape[2], keys.device):
            read = F.scaled_dot_product_attention(
                keys[:, :, block] * beta[:, None, None], keys[:, :, reach], values[:, :, reach], attn_mask=mask, scale=1.0
            )
            out[:, :, block] = read
        ctx.save_for_backward(keys, values, beta, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        keys, values, beta, out = ctx.saved_tensors
        grad_keys, grad_values, grad_beta = torch.zeros_like(keys), torch.zeros_like(values), torch.zeros_like(beta)
        for block, reach, mask in _windows(keys.shape[2], keys.device):
            q, k, v, g = keys[:, :, block] * beta[:, None, None], keys[:, :, reach], values[:, :, reach], grad[:, :, block]
            weights = (q @ k.transpose(-1, -2)).add_(mask).softmax(-1)
            slopes = (g @ v.transpose(-1, -2)).sub_((g * out[:, :, block]).sum(-1, keepdim=True)).mul_(weights)
            grad_values[:, :, reach] += weights.transpose(-1, -2) @ g
            grad_keys[:, :, reach] += slopes.transpose(-1, -2) @ q
            grad_q = slopes @ k
            grad_beta += (grad_q * keys[:, :, block]).sum((0, 2, 3))
            grad_keys[:, :, block] += grad_q * beta[:, None, None]
        return grad_keys, grad_values, grad_beta


def _windows(time: int, device: torch.device):
    """(queries, pairs, mask to add) of each block."""
    for begin in range(0, time, BLOCK):
        first = max(0, begin - BLOCK)
        t = torch.arange(begin, min(begin + BLOCK, time), device=device)[:, None]
        pair = torch.arange(first, begin + len(t), device=device)[None]
        mask = torch.where((pair < t) & (pair > t - BLOCK), 0.0, -math.inf)
        if begin == 0:
            mask[0, 0] = 0.0  # the first query reads nothing, and a softmax of nothing is NaN: let it read itself
        yield slice(begin, begin + len(t)), slice(first, begin + len(t)), mask


def window_read(keys_BTHD: Tensor, values_BTHD: Tensor, beta_H: Tensor) -> Tensor:
    """The hand-written block form: pairs t - 255 .. t - 1 (the first query, whose memory is empty, reads itself)."""
    return _WindowRead.apply(keys_BTHD.transpose(1, 2), values_BTHD.transpose(1, 2), beta_H).transpose(1, 2)

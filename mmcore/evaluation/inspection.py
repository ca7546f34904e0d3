"""What the heads of a model read for one token: which past tokens, with what weight, how sharply, out of how many.

Equations (4) and (6): head h gives pair i the weight softmax_i(beta k_t . k_i), beta = beta_1 n^alpha + beta_0, over the
n pairs that the query at t may read. A transformer is shown in the same terms: beta = 1 / sqrt(D), and its heads read
their own token too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcore.errors import ConfigError
from mmcore.model.documents import Packing
from mmcore.model.transformer import Attention

MOST_TOKENS = 1 << 17


@dataclass(frozen=True)
class Read:
    """What one head reads."""

    layer: int
    memory: str
    """short_term, long_term or attention."""
    head: int
    first: int
    """Position of the oldest pair it may read; the weights are of first, first + 1, ..."""
    weights: Tensor
    """[n] fp32, they sum to 1; empty for an empty memory."""
    bandwidth: float
    """beta; NaN for an empty memory."""

    @property
    def size(self) -> int:
        """n, the pairs in the memory."""
        return len(self.weights)

    def strongest(self, count: int) -> list[tuple[int, float]]:
        """(position, weight) of the pairs with the greatest weights."""
        values, places = self.weights.topk(min(count, self.size))
        return [(self.first + place, value) for place, value in zip(places.tolist(), values.tolist(), strict=True)]


@torch.no_grad()
def inspect(model: Any, ids: list[int], token: int = -1) -> list[Read]:
    """What every head of every memory reads at position `token` of `ids` (negative: from the end), layers in order.

    Memories that were removed are left out. Raises ConfigError for a position that is not there, or a model whose
    memories are not among those known here.
    """
    place = token + len(ids) if token < 0 else token
    if not 0 <= place < len(ids):
        raise ConfigError(f"--token is {token}: the text has the tokens 0 to {len(ids) - 1:,}")
    if len(ids) > MOST_TOKENS:
        raise ConfigError(f"the text has {len(ids):,} tokens: inspect at most {MOST_TOKENS:,}")
    x = model.embed(torch.tensor([ids[: place + 1]], device=next(model.parameters()).device))
    delay, packing = model.config.long_term_delay, Packing()
    found: list[Read] = []
    for depth, layer in enumerate(model.model.layers):
        for name, memory, y, behind in _memories(layer, x, delay):
            if name not in model.knocked_out:
                found += _reads(depth, name, memory, y, place, behind)
        x = layer(x, packing, delay, model.knocked_out)
    return found


def _memories(layer: Any, x: Tensor, delay: int) -> list[tuple[str, Any, Tensor, int]]:
    """(name, memory, what it sees, distance to the newest pair it reads) of a layer."""
    if hasattr(layer, "self_attn"):
        return [("attention", layer.self_attn, layer.input_layernorm(x), 0)]
    if not hasattr(layer, "memory_norm"):
        raise ConfigError(f"--inspect cannot look into a {type(layer).__name__}: give a Memory Mosaic or a transformer")
    y = layer.memory_norm(x)
    return [("short_term", layer.short_term, y, layer.SHORT_DELAY), ("long_term", layer.long_term, y, delay)]


def _reads(depth: int, name: str, memory: Any, y: Tensor, place: int, behind: int) -> list[Read]:
    """The heads of one memory at its newest position."""
    last = place - behind
    first = max(0, place - memory.window + 1) if memory.window else 0
    count = max(0, last - first + 1)
    query_HD, keys_THD, betas = _query_and_keys(memory, y, count)
    if not count:
        return [Read(depth, name, head, first, torch.zeros(0), math.nan) for head in range(query_HD.shape[0])]
    scores_HT = torch.einsum("hd,thd->ht", query_HD.float(), keys_THD[first : last + 1].float())
    weights = (scores_HT * betas[:, None]).softmax(-1).cpu()
    return [Read(depth, name, head, first, weights[head], float(betas[head])) for head in range(len(weights))]


def _query_and_keys(memory: Any, y: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The newest query [H, D], all keys [T, H, D], and beta [H] for `count` pairs."""
    if isinstance(memory, Attention):
        queries, keys, _ = memory._arrange(y, 0)
        keys = keys.repeat_interleave(memory.heads // memory.kv_heads, dim=2)
        return queries[0, -1], keys[0], torch.full((memory.heads,), 1 / math.sqrt(memory.size), device=y.device)
    keys, _, _ = memory.keys(y, None)
    base, slope, exponent = memory.bandwidth()
    return keys[0, -1], keys[0], slope * max(1, count) ** exponent + base


def distance_edges(longest: int) -> list[int]:
    """Rising first distances of bins that double: 0, 1, 2, 4, 8 ... up to `longest`, and the end."""
    edges, edge = [0, 1], 2
    while edge <= longest:
        edges.append(edge)
        edge *= 2
    return [*edges, max(longest, 1) + 1]


def by_distance(read: Read, place: int, edges: list[int]) -> list[float]:
    """The weight a head gives to each range of distances [edges[i], edges[i + 1]) from position `place` back."""
    sums = [0.0] * (len(edges) - 1)
    if not read.size:
        return sums
    distance = place - torch.arange(read.first, read.first + read.size)
    bins = torch.bucketize(distance, torch.tensor(edges), right=True) - 1
    totals = torch.zeros(len(sums), dtype=torch.float64).index_add(0, bins, read.weights.double())
    return totals.tolist()


def pairs_by_distance(read: Read, place: int, edges: list[int]) -> list[int]:
    """How many pairs a head may read in each range of distances."""
    nearest, farthest = place - (read.first + read.size - 1), place - read.first
    return [max(0, min(high - 1, farthest) - max(low, nearest) + 1) if read.size else 0
            for low, high in zip(edges, edges[1:], strict=False)]


def as_json(reads: list[Read], place: int, pieces: list[str], strongest: int = 5) -> list[dict[str, Any]]:
    """Plain values: each head's size, bandwidth, strongest tokens, weight by distance."""
    edges = distance_edges(place)
    return [
        {"layer": read.layer, "memory": read.memory, "head": read.head, "size": read.size,
         "bandwidth": None if not read.size else read.bandwidth,
         "strongest": [{"position": at, "distance": place - at, "token": pieces[at], "weight": weight}
                       for at, weight in read.strongest(strongest)],
         "by_distance": [{"from": low, "to": high - 1, "weight": weight, "pairs": pairs} for low, high, weight, pairs in
                         zip(edges, edges[1:], by_distance(read, place, edges), pairs_by_distance(read, place, edges),
                             strict=False)]}
        for read in reads
    ]


def plot(reads: list[Read], place: int, title: str, paths: list[Any]) -> None:
    """A column for each memory: heads by distance, how a head's weight is spread over the past; below, the weight of
    one pair against its distance, a line for each head."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mm"
    from matplotlib import pyplot

    edges = distance_edges(place)
    memories = list(dict.fromkeys(read.memory for read in reads))
    rows = len(reads) / len(memories)
    heights = [0.5 + 0.16 * rows, 2.4]
    figure, axes = pyplot.subplots(2, len(memories), figsize=(5.2 * len(memories) + 0.6, sum(heights) + 1.4), dpi=150,
                                   layout="constrained", squeeze=False, height_ratios=heights)
    for column, memory in enumerate(memories):
        mine = [read for read in reads if read.memory == memory]
        image = _draw_shares(axes[0][column], mine, place, edges)
        axes[0][column].set_title(memory.replace("_", "-") + ("" if memory == "attention" else " memory"), fontsize=9)
        _draw_curves(axes[1][column], mine, place, edges)
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8).set_label("share of the head's weight", fontsize=8)
    figure.suptitle(title, fontsize=9)
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
    pyplot.close(figure)


def _draw_shares(axis: Any, reads: list[Read], place: int, edges: list[int]) -> Any:
    """Heads by distance; grey where the memory holds no pair so near or so far."""
    shares = [[share if pairs else math.nan for share, pairs in
               zip(by_distance(read, place, edges), pairs_by_distance(read, place, edges), strict=True)] for read in reads]
    image = axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axis.set_facecolor("#e9e9e9")
    names = [f"{low:,}" if high - low == 1 else f"{low:,}-{high - 1:,}" for low, high in zip(edges, edges[1:], strict=False)]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
    several = len({read.layer for read in reads}) < len(reads)
    every = max(1, len(reads) // 64)  # names of more lines would cover one another
    heads = [f"layer {read.layer} head {read.head}" if several else f"layer {read.layer}" for read in reads]
    axis.set_yticks(range(0, len(reads), every), heads[::every], fontsize=6)
    axis.set_xlabel("distance in tokens (grey: no pair)", fontsize=8)
    return image


def _draw_curves(axis: Any, reads: list[Read], place: int, edges: list[int]) -> None:
    """The mean weight of a pair at each distance, a line for each head, a shade for each layer; dotted: all pairs alike."""
    from matplotlib import colormaps

    layers = sorted({read.layer for read in reads})
    for read in reads:
        found = [(math.sqrt(max(low, 0.7) * max(high - 1, 0.7)), share / pairs) for low, high, share, pairs in
                 zip(edges, edges[1:], by_distance(read, place, edges), pairs_by_distance(read, place, edges), strict=False)
                 if pairs]
        shade = 0.15 + 0.7 * layers.index(read.layer) / max(1, len(layers) - 1)
        label = f"layer {read.layer}" if read.head == reads[0].head and len(layers) <= 8 else None
        axis.plot([distance for distance, _ in found], [max(weight, 1e-7) for _, weight in found], linewidth=1,
                  color=colormaps["viridis"](shade), marker=".", markersize=3, label=label)
    sizes = [read.size for read in reads if read.size]
    if sizes:
        axis.axhline(1 / max(sizes), color="#777777", linestyle=":", linewidth=1, label="all pairs alike")
        axis.legend(fontsize=6, frameon=False)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(1e-7, 2)
    axis.set_xlim(0.6, edges[-1])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0")
    axis.grid(True, color="#e6e6e6", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)
    axis.set_xlabel("distance in tokens", fontsize=8)
    axis.set_ylabel("weight of a pair", fontsize=8)

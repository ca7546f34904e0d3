"""The contextual memories of a Memory Mosaic v2: the paper's equations, and what decoding remembers.

Equation numbers are those of Zhang and Bottou, "Memory Mosaics at scale", arXiv 2507.03285. Plain PyTorch without a
T x T matrix. Shape suffixes: B rows, T tokens, Q queries, K pairs, C a chunk of tokens, H heads, D head size.
"""

import math

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

SCAN_CHUNK = 32  # tokens whose keys come out of one matrix product
READ_BLOCK = 512  # queries that read a memory at once


def unit_keys(raw_BTHD, log_gates_BTH, log_decays_BTH, resets_BT=None, state=None):
    """Equation (8): k_t = kbar_t / ||kbar_t||, kbar_t = exp(log_gate_t) k~_t + exp(log_decay_t) kbar_{t-1}.

    kbar is zero before a document begins (`resets`). `state` is (vector [B, H, D], log_scale [B, H]) with
    kbar = exp(log_scale) vector. Returns the keys and the state after the last token. Keys do not depend on the scale
    of kbar, so all weights are taken relative to a running maximum, and no gate can overflow.
    """
    B, T, H, D = raw_BTHD.shape
    wide = wide_dtype(raw_BTHD)
    if state is None:
        state = raw_BTHD.new_zeros(B, H, D, dtype=wide), raw_BTHD.new_full((B, H), -math.inf, dtype=wide)
    vector, log_scale = state
    keys = []
    for begin in range(0, T, SCAN_CHUNK):
        piece = slice(begin, begin + SCAN_CHUNK)
        raw, gate, decay = (x[:, piece].to(wide).transpose(1, 2) for x in (raw_BTHD, log_gates_BTH, log_decays_BTH))
        C = raw.shape[2]
        earlier = torch.ones(C, C, dtype=torch.bool, device=raw.device).tril(-1)  # [t, s], s < t
        # Decays of the tokens s + 1 .. t, summed as they stand: a difference of two running sums would lose digits.
        decayed = decay[..., None].expand(B, H, C, C).masked_fill(~earlier, 0).cumsum(2)
        closed = earlier.T
        carried = decay.cumsum(2) + log_scale[..., None]
        if resets_BT is not None:
            document = resets_BT[:, piece].long().cumsum(1)
            closed = closed | (document[:, None, :, None] != document[:, None, None, :])
            carried = carried.masked_fill((document > 0)[:, None], -math.inf)
        exponent = (gate[:, :, None] + decayed).masked_fill(closed, -math.inf)
        log_scale_t = torch.maximum(exponent.amax(-1), carried).detach()
        kbar = (exponent - log_scale_t[..., None]).exp() @ raw
        kbar = kbar + (carried - log_scale_t).exp()[..., None] * vector[:, :, None]
        keys.append(_unit(kbar).transpose(1, 2))
        vector, log_scale = kbar[:, :, -1], log_scale_t[:, :, -1]
    return torch.cat(keys, 1).to(raw_BTHD.dtype), (vector, log_scale)


def look_ahead_values(raw_BTHD, mix_H, scale_H, following_BHD=None):
    """Equation (9): v_t = scale vbar_t / ||vbar_t||, vbar_t = mix v~_t + (1 - mix) v~_{t+1}; v~ after the last is given."""
    raw = raw_BTHD.to(wide_dtype(raw_BTHD))
    last = torch.zeros_like(raw[:, 0]) if following_BHD is None else following_BHD.to(raw.dtype)
    mix, scale = mix_H.to(raw.dtype)[:, None], scale_H.to(raw.dtype)[:, None]
    return (scale * _unit(mix * raw + (1 - mix) * torch.cat([raw[:, 1:], last[:, None]], 1))).to(raw_BTHD.dtype)


def read_memory(queries_BQHD, keys_BKHD, values_BKHD, bandwidth, starts_BQ, window, delay, offset):
    """Equations (4), (6), (10): sum_j softmax_j(beta q.k_j) v_j over the pairs j that a query may read, [B, Q, H, D].

    Query i stands at p = offset + i and reads the n pairs max(starts, p - window + 1) .. p - delay with
    beta = beta_1 n^alpha + beta_0, `bandwidth` being (beta_0, beta_1, alpha), each [H]. An empty memory reads as zero.
    """
    wide, device = wide_dtype(queries_BQHD), queries_BQHD.device
    base, slope, exponent = (x.to(wide) for x in bandwidth)
    out = []
    for begin in range(0, queries_BQHD.shape[1], READ_BLOCK):
        queries = queries_BQHD[:, begin : begin + READ_BLOCK]
        Q, here = queries.shape[1], offset + begin
        lowest, end = max(0, here - window + 1) if window else 0, here + Q - delay
        if end <= lowest:
            out.append(torch.zeros_like(queries))
            continue
        position = torch.arange(here, here + Q, device=device)[None]
        last = position - delay
        first = (position - window + 1).clamp(min=0) if window else torch.zeros_like(position)
        if starts_BQ is not None:
            first = torch.maximum(first, starts_BQ[:, begin : begin + Q])
        count = (last - first + 1).clamp(min=0)
        beta = slope * count.clamp(min=1)[..., None].to(wide) ** exponent + base
        pair = torch.arange(lowest, end, device=device)
        # Backends differ in what a query without any pair gets, so it may read all, and is set to zero afterwards.
        empty = count == 0
        open_ = ((pair >= first[..., None]) & (pair <= last[..., None])) | empty[..., None]
        keys, values = (x[:, lowest:end].to(wide).transpose(1, 2) for x in (keys_BKHD, values_BKHD))
        scaled = (queries.to(wide) * beta[..., None]).transpose(1, 2)
        read = F.scaled_dot_product_attention(scaled, keys, values, attn_mask=open_[:, None], scale=1.0)
        out.append(read.transpose(1, 2).masked_fill(empty[..., None, None], 0).to(queries.dtype))
    return torch.cat(out, 1)


def _unit(x):
    """x / ||x|| over the last dimension; zero, with zero gradient, where the norm is zero."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm == 0, 0, x / torch.where(norm == 0, 1, norm))


def wide_dtype(x):
    """The dtype of sums and scores: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class MemoryState:
    """What one contextual memory keeps of B rows: the key recurrence, the newest pair, which still waits for the token
    that completes its value, and the completed pairs, of which a short-term memory needs the last window - 1."""

    def __init__(self, window=None):
        self.window = window
        self.reset()

    def reset(self):
        self.first = 0  # time of the pair in slot 0
        self.used = 0  # slots that hold a pair
        self.scan = self.pending_key = self.pending_raw = self.keys = self.values = None

    def append(self, keys, raw, complete):
        """Add the pairs of T tokens, [B, T, H, D]; the last waits. `complete(raw, following)` is equation (9)."""
        if self.pending_key is not None:
            keys, raw = torch.cat([self.pending_key, keys], 1), torch.cat([self.pending_raw, raw], 1)
        if keys.shape[1] > 1:
            self._store(keys[:, :-1], complete(raw[:, :-1], raw[:, -1]))
        elif self.keys is None:
            self.keys = self.values = keys[:, :0]
        self.pending_key, self.pending_raw = keys[:, -1:].clone(), raw[:, -1:].clone()

    def _store(self, keys, values):
        if self.window is not None:
            drop = max(0, self.used - (self.window - 1))
            self.first, self.used = self.first + drop, self.used - drop
            if self.used:
                keys = torch.cat([self.keys[:, drop:], keys], 1)
                values = torch.cat([self.values[:, drop:], values], 1)
            self.keys, self.values, self.used = keys, values, keys.shape[1]
            return
        total = self.used + keys.shape[1]
        if self.used and (keys.requires_grad or values.requires_grad or self.keys.requires_grad):
            keys = torch.cat([self.keys[:, : self.used], keys], 1)  # writing into a buffer would break the graph
            values = torch.cat([self.values[:, : self.used], values], 1)
        elif self.used:
            if total > self.keys.shape[1]:
                self.keys, self.values = (self._larger(old, total) for old in (self.keys, self.values))
            self.keys[:, self.used : total], self.values[:, self.used : total] = keys, values
            self.used = total
            return
        self.keys, self.values, self.used = keys, values, total

    def _larger(self, old, total):
        new = old.new_empty(old.shape[0], max(total, 2 * old.shape[1], 256), *old.shape[2:])
        new[:, : self.used] = old[:, : self.used]
        return new

    def pairs(self):
        """Completed keys and values, each [B, used, H, D]."""
        return self.keys[:, : self.used], self.values[:, : self.used]

    def map_rows(self, function):
        """Replace every tensor x, [B, ...], by function(x)."""
        for name in ("keys", "values", "pending_key", "pending_raw"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        if self.scan is not None:
            self.scan = tuple(function(x) for x in self.scan)


class MemoryMosaicCache(Cache):
    """The memories of B rows of text, as generate() keeps them. What has been read cannot be taken back."""

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # else generate() of 5.24 reads the whole text again behind a cache that it is given

    def __init__(self, config):
        super().__init__(layers=[])
        self.length = 0  # tokens read, padding included
        self.starts = None  # int64 [B]: padding in front of each row; None where there is none
        self.memories = [
            (MemoryState(config.short_term_window), MemoryState()) for _ in range(config.num_hidden_layers)
        ]

    def __len__(self):
        return len(self.memories)

    def __repr__(self):
        return f"{type(self).__name__}(tokens={self.length}, layers={len(self)})"

    @property
    def batch_size(self):
        keys = self.memories[0][0].pending_key
        return -1 if keys is None else keys.shape[0]

    @property
    def is_initialized(self):
        return self.length > 0

    def get_seq_length(self, layer_idx=0):
        return self.length

    def get_max_length(self, layer_idx=None):
        return -1

    def get_max_cache_shape(self, layer_idx=0):
        return -1

    def get_mask_sizes(self, query_length, layer_idx=0):
        return self.length + int(query_length), 0

    def has_previous_state(self, layer_idx=None, state_idx=None):
        return self.length > 0

    def update(self, *args, **kwargs):
        raise ValueError("a MemoryMosaicCache is filled by its own model only")

    def crop(self, *args, **kwargs):
        raise ValueError("a Memory Mosaic cannot forget its newest tokens: read the shorter text into a new cache")

    def reset(self):
        self.length, self.starts = 0, None
        for state in self._states():
            state.reset()

    def reorder_cache(self, beam_idx):
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self._map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices):
        self._map_rows(lambda x: x[indices.to(x.device)])

    def _states(self):
        return [state for pair in self.memories for state in pair]

    def _map_rows(self, function):
        if self.starts is not None:
            self.starts = function(self.starts)
        for state in self._states():
            state.map_rows(function)

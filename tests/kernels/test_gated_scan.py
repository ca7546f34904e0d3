"""Shapes: B batch, T time, H heads, D head size. The truth is a float64 loop over equation 8 as it is printed."""

import os
import re
import subprocess
import sys

import pytest
import torch

from mmcore.errors import ConfigError
from mmcore.kernels.gated_scan import blocked, gated_scan
from tests.helpers.forms import DEVICE, ON_GPU, needs_triton
from tests.helpers.poison import poisoned_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_form = pytest.mark.parametrize("form", ["reference", "blocked", "cpu"])
on_a_card = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")


def truth(raw, gates, decays, resets=None, kbar=None):
    """Keys and the last kbar by the definition, in float64 and without any rescaling; differentiable."""
    raw, gates, decays = raw.double(), gates.double(), decays.double()
    kbar = torch.zeros_like(raw[:, 0]) if kbar is None else kbar.double()
    keys = []
    for t in range(raw.shape[1]):
        before = kbar if resets is None else torch.where(resets[:, t, None, None], 0.0, kbar)
        kbar = gates[:, t, :, None].exp() * raw[:, t] + decays[:, t, :, None].exp() * before
        # The largest entry is divided out first: exp(500) squared is beyond float64.
        largest = kbar.abs().amax(-1, keepdim=True)
        rescaled = kbar / torch.where(largest == 0, 1.0, largest)
        length = rescaled.square().sum(-1, keepdim=True)
        keys.append(torch.where(length == 0, 0.0, rescaled / torch.where(length == 0, 1.0, length).sqrt()))
    return torch.stack(keys, 1), kbar


def problem(B, T, H, D, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(B, T, H, D, generator=generator).to(dtype)
    gates = (2 * torch.randn(B, T, H, generator=generator)).to(dtype)
    decays = (-torch.randn(B, T, H, generator=generator).abs() * torch.rand(B, 1, H, generator=generator)).to(dtype)
    return raw, gates, decays


def gradients(function, raw, gates, decays, upstream):
    leaves = [part.detach().clone().requires_grad_() for part in (raw, gates, decays)]
    keys = function(*leaves)
    return keys.detach(), torch.autograd.grad(keys, leaves, upstream.to(keys.dtype))


def assert_close(got, want, tolerance=2e-5, name="keys", least=0.0):
    """The greatest error against the greatest wanted number, or against `least` where that is more."""
    assert got.isfinite().all(), name
    error = (got.double() - want).abs().max().item()
    scale = max(want.abs().max().item(), least)
    assert error <= tolerance * scale, f"{name}: {error:.2e} beside {scale:.2e}"


def check(form, raw, gates, decays, resets=None, tolerance=2e-5):
    """Keys and all gradients of `form`, for random upstream gradients, against the float64 loop."""
    upstream = torch.randn(raw.shape, generator=torch.Generator().manual_seed(9))
    doubles = raw.double(), gates.double(), decays.double()
    want, want_gradients = gradients(lambda *x: truth(*x, resets)[0], *doubles, upstream)
    device = DEVICE if form == "triton" else "cpu"
    marks = resets if resets is None else resets.to(device)
    got, got_gradients = gradients(
        lambda *x: gated_scan(*x, resets=marks, implementation=form)[0],
        *(x.to(device) for x in (raw, gates, decays)), upstream.to(device),
    )
    got, got_gradients = got.cpu(), [x.cpu() for x in got_gradients]
    assert got.dtype == raw.dtype
    assert_close(got, want, tolerance)
    for name, a, b in zip(("raw keys", "gates", "decays"), got_gradients, want_gradients, strict=True):
        assert_close(a, b, 5 * tolerance, name, least=0.1)


def cut(B, T, *lengths):
    """Resets of documents of these lengths, shifted by one document from row to row."""
    resets = torch.zeros(B, T, dtype=torch.bool)
    for row in range(B):
        start = 0
        for n in range(T):
            if start >= T:
                break
            resets[row, start] = True
            start += lengths[(n + row) % len(lengths)]
    return resets


@every_form
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 1000])
def test_keys_and_gradients(form, T):
    check(form, *problem(2, T, 3, 16, seed=T))


@every_form
@pytest.mark.parametrize("H, D", [(1, 1), (2, 5), (4, 32), (2, 64), (1, 96), (2, 128), (65, 8), (3, 256)])
def test_head_counts_and_sizes(form, H, D):
    check(form, *problem(2, 40, H, D, seed=D))


@every_form
@pytest.mark.parametrize("lengths", [(1,), (1, 2, 1, 30), (64, 1), (33, 31), (7, 100)])
def test_documents_do_not_mix(form, lengths):
    resets = cut(3, 150, *lengths)
    check(form, *problem(3, 150, 2, 32, seed=3), resets=resets)


@every_form
def test_a_document_has_the_bits_it_would_have_at_another_neighbour(form):
    raw, gates, decays = problem(1, 90, 2, 16)
    resets = cut(1, 90, 41, 49)
    before, _ = gated_scan(raw, gates, decays, resets=resets, implementation=form)
    raw[:, :41] *= -3
    gates[:, :41] += 5
    after, _ = gated_scan(raw, gates, decays, resets=resets, implementation=form)
    assert torch.equal(before[:, 41:], after[:, 41:])
    assert not torch.equal(before[:, :41], after[:, :41])


@every_form
def test_nothing_leaks_from_the_future(form):
    raw, gates, decays = problem(2, 70, 2, 16)
    before, _ = gated_scan(raw, gates, decays, implementation=form)
    raw[:, 45], gates[:, 46], decays[:, 47] = 7.0, 3.0, -9.0
    after, _ = gated_scan(raw, gates, decays, implementation=form)
    assert torch.equal(before[:, :45], after[:, :45])
    assert not torch.equal(before[:, 45:], after[:, 45:])


@every_form
def test_nonzero_starting_state(form):
    raw, gates, decays = problem(2, 50, 3, 32)
    vector, log_scale = torch.randn(2, 3, 32), torch.randn(2, 3)
    upstream = torch.randn(raw.shape)
    kbar = log_scale.double().exp()[..., None] * vector.double()
    want, want_gradients = gradients(
        lambda *x: truth(*x, kbar=kbar)[0], raw.double(), gates.double(), decays.double(), upstream
    )
    got, got_gradients = gradients(
        lambda *x: gated_scan(*x, state=(vector, log_scale), implementation=form)[0], raw, gates, decays, upstream
    )
    assert_close(got, want)
    for name, a, b in zip(("raw keys", "gates", "decays"), got_gradients, want_gradients, strict=True):
        assert_close(a, b, 1e-4, name, least=0.1)


@every_form
@pytest.mark.parametrize("grad", [False, True])
def test_returned_state_is_the_last_kbar(form, grad):
    raw, gates, decays = problem(2, 77, 3, 16)
    resets = cut(2, 77, 20, 30)
    with torch.set_grad_enabled(grad):
        _, (vector, log_scale) = gated_scan(raw.requires_grad_(grad), gates, decays, resets=resets, implementation=form)
    assert vector.dtype == log_scale.dtype == torch.float32
    assert not vector.requires_grad and not log_scale.requires_grad
    _, kbar = truth(raw.detach(), gates, decays, resets)
    assert_close(log_scale.double().exp()[..., None] * vector, kbar)


@every_form
@pytest.mark.parametrize("cuts", [(1, 2, 5, 64, 65), (30,), tuple(range(1, 100))])
def test_pieces_with_carried_state_equal_the_whole(form, cuts):
    raw, gates, decays = problem(2, 100, 2, 32)
    resets = cut(2, 100, 35, 8)
    whole, (_, last) = gated_scan(raw, gates, decays, resets=resets, implementation=form)
    state, pieces = None, []
    for a, b in zip((0, *cuts), (*cuts, 100), strict=True):
        keys, state = gated_scan(
            raw[:, a:b], gates[:, a:b], decays[:, a:b], resets=resets[:, a:b], state=state, implementation=form
        )
        pieces.append(keys)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state[1], last, rtol=1e-5, atol=1e-5)


@every_form
def test_an_empty_state_is_no_state(form):
    raw, gates, decays = problem(2, 40, 2, 16)
    empty = torch.zeros(2, 2, 16), torch.full((2, 2), -torch.inf)
    want, _ = gated_scan(raw, gates, decays, implementation=form)
    got, state = gated_scan(raw, gates, decays, state=empty, implementation=form)
    assert torch.equal(got, want)
    assert empty[1].isneginf().all(), "the caller's state was written to"
    nothing, (vector, log_scale) = gated_scan(raw[:, :0], gates[:, :0], decays[:, :0], state=state, implementation=form)
    assert nothing.shape == (2, 0, 2, 16) and torch.equal(vector, state[0]) and torch.equal(log_scale, state[1])


@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", [80.0, -80.0, 500.0, -500.0])
@pytest.mark.parametrize("decay", [0.0, -0.5, -500.0])
def test_extreme_gates_and_decays(form, dtype, gate, decay):
    """Steps of the extreme gate stand among ordinary ones, and all together."""
    raw, gates, decays = problem(2, 70, 2, 16)
    gates[:, 10:40] = gate
    gates[:, 20] = 0.25
    decays[:, 5:60] = decay
    raw, gates, decays = raw.to(dtype), gates.to(dtype), decays.to(dtype)
    eps = max(torch.finfo(dtype).eps, 4e-5)  # gates of 500 carry an error of 3e-5 in fp32
    keys, (vector, log_scale) = gated_scan(raw, gates, decays, implementation=form)
    want, _ = truth(raw, gates, decays)
    assert keys.dtype == dtype and vector.isfinite().all() and log_scale.isfinite().all()
    assert_close(keys, want, 2 * eps)
    upstream = torch.randn(raw.shape)
    _, got = gradients(lambda *x: gated_scan(*x, implementation=form)[0], raw, gates, decays, upstream)
    doubles = [x.double() for x in (raw, gates, decays)]
    # The upstream gradient as the kernel sees it, rounded to its dtype.
    _, want = gradients(lambda *x: truth(*x)[0], *doubles, upstream.to(dtype))
    for name, a, b in zip(("raw keys", "gates", "decays"), got, want, strict=True):
        assert_close(a, b, 10 * eps, name, least=0.1)


@every_form
@pytest.mark.parametrize("gate", [600.0, -600.0, 1e4, -1e4])
def test_gates_beyond_float64(form, gate):
    """A constant added to all gates changes no key; exp(1e4) itself is beyond every format."""
    raw, gates, decays = problem(1, 80, 2, 16, dtype=torch.float64)
    gates = gates.float().mul(64).round().div(64).double()  # so that adding 1e4 in fp32 is exact
    want, _ = truth(raw, gates, decays)
    got, (vector, log_scale) = gated_scan(raw.float(), (gates + gate).float(), decays.float(), implementation=form)
    assert vector.isfinite().all() and log_scale.isfinite().all()
    assert_close(got, want, 2e-2 if abs(gate) == 1e4 else 1e-3)


@every_form
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float64, 1e-12)])
def test_dtypes(form, dtype, tolerance):
    if form == "cpu" and dtype == torch.float64:
        with pytest.raises(ConfigError, match="fp32"):
            gated_scan(*problem(1, 3, 1, 4, dtype=dtype), implementation=form)
        return
    check(form, *problem(2, 65, 2, 16, dtype=dtype), tolerance=tolerance)


@every_form
def test_zero_raw_keys_give_zero_keys_and_zero_gradients(form):
    raw, gates, decays = problem(2, 40, 2, 16)
    raw[:, :7] = 0
    raw[1] = 0
    check(form, raw, gates, decays)
    leaves = [part.requires_grad_() for part in (raw, gates, decays)]
    keys, _ = gated_scan(*leaves, implementation=form)
    got = torch.autograd.grad(keys, leaves, torch.randn(keys.shape))
    assert (keys[:, :7] == 0).all() and (keys[1] == 0).all()
    for gradient in got:
        assert (gradient[1] == 0).all()


@every_form
def test_slices_of_one_projection_are_read_in_place(form):
    B, T, H, D = 2, 45, 3, 16
    fused = torch.randn(B, T, 2 * H * D + 2 * H)
    raw = fused[..., : H * D].unflatten(-1, (H, D))
    gates, decays = fused[..., -2 * H : -H], -fused[..., -H:].abs()
    check(form, raw, gates, decays)
    check(form, raw.transpose(0, 1), gates.transpose(0, 1), decays.transpose(0, 1))
    check(form, raw.transpose(2, 3).contiguous().transpose(2, 3), gates, decays)


@every_form
def test_expanded_upstream_gradients(form):
    raw, gates, decays = problem(2, 33, 2, 16)
    raw.requires_grad_()
    keys, _ = gated_scan(raw, gates, decays, implementation=form)
    keys.sum().backward()
    (want,) = torch.autograd.grad(
        gated_scan(raw, gates, decays, implementation="reference")[0], raw, torch.ones(keys.shape)
    )
    torch.testing.assert_close(raw.grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["reference", "blocked"])
def test_gradcheck(form, monkeypatch):
    monkeypatch.setattr(blocked, "CHUNK", 4)
    parts = [part.requires_grad_() for part in problem(2, 11, 1, 3, dtype=torch.float64)]
    resets = cut(2, 11, 3, 6)
    torch.autograd.gradcheck(lambda *x: gated_scan(*x, resets=resets, implementation=form)[0], parts)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_bits(threads):
    raw, gates, decays = problem(3, 300, 5, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        many, _ = gated_scan(raw, gates, decays, implementation="cpu")
        torch.set_num_threads(3)
        three, _ = gated_scan(raw, gates, decays, implementation="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(many, three)


def test_not_finite_in_one_document_stays_there():
    raw, gates, decays = problem(1, 60, 2, 16)
    raw[0, 10, 0, 3] = torch.nan
    resets = cut(1, 60, 30)
    keys, _ = gated_scan(raw, gates, decays, resets=resets, implementation="cpu")
    assert keys[0, 10:30, 0].isnan().all(), "a NaN must be seen, not hidden"
    assert keys[0, 30:].isfinite().all() and keys[0, :, 1].isfinite().all()


@needs_triton
def test_triton_without_heads():
    nothing = torch.empty(1, 5, 0, 8, device=DEVICE), *(torch.empty(1, 5, 0, device=DEVICE) for _ in range(2))
    assert gated_scan(*nothing, implementation="triton")[0].shape == (1, 5, 0, 8)


def test_fp64_runs_by_itself_and_bad_input_is_named():
    raw, gates, decays = problem(1, 5, 2, 4)
    keys, (vector, _) = gated_scan(raw.double(), gates.double(), decays.double())
    assert keys.dtype == vector.dtype == torch.float64
    with pytest.raises(ValueError, match=r"gates \(1, 5\)"):
        gated_scan(raw, gates[..., 0], decays)
    with pytest.raises(ValueError, match="give bool"):
        gated_scan(raw, gates, decays, resets=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="state"):
        gated_scan(raw, gates, decays, state=(torch.zeros(1, 2, 3), torch.zeros(1, 2)))
    with pytest.raises(ConfigError, match="no implementation 'fast'"):
        gated_scan(raw, gates, decays, implementation="fast")


@pytest.fixture
def small_chunks(monkeypatch):
    """Log-maxima found for 16 or 32 steps of one or two heads at a time, stretches of two pieces of 16 and groups of two, so that short texts have
    several."""
    from mmcore.kernels.gated_scan import triton

    monkeypatch.setattr(triton, "WIDE", 2)
    monkeypatch.setattr(triton, "FOLDED", 2)
    monkeypatch.setattr(triton, "GROUPS", (1, 2))
    stretches_of(triton, monkeypatch, 2)
    return triton


def stretches_of(triton, monkeypatch, pieces):
    monkeypatch.setattr(triton, "STRETCH", {"forward": (pieces, 128), "backward": (pieces, 168)})


@needs_triton
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(("B", "T", "H"), [
    (2, 1, 2), (1, 15, 3), (1, 40, 33),
    *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((2, 300, 2), (1, 500, 3), (1, 1200, 1))),
])  # fmt: skip
@pytest.mark.parametrize("small, how", [
    (False, "joined"), (True, "joined"), pytest.param(True, "heads first", marks=pytest.mark.slow),
])  # fmt: skip
def test_triton_log_maxima(monkeypatch, small, how, B, T, H, stateful):
    """The factors of all steps against the recurrence in float64, and the unit of the state: one and the same on both sides
    of each step, though programs find it in blocks. It is some hundreds, whose last bits are 3e-5 of a state."""
    from mmcore.kernels.gated_scan import triton

    if small:
        monkeypatch.setattr(triton, "WIDE", 64 if H > 32 else 4)
        monkeypatch.setattr(triton, "FOLDED", 2)
    generator = torch.Generator().manual_seed(T + H)
    both = torch.randn(*((B, T, 3, H) if how == "joined" else (H, B, 3, T)), generator=generator)
    both = both if how == "joined" else both.permute(1, 3, 2, 0)  # heads far apart, or other numbers between
    both[:, :, 0] *= 4
    both[:, :, 0] -= 300
    both[:, :, 2] = -both[:, :, 2].abs() / 10
    gates, decays = both[:, :, 0], both[:, :, 2]
    assert H == 1 or not gates.is_contiguous()
    resets = (torch.rand(T, B, generator=generator) < 0.02).T
    state = torch.randn(B, H, generator=generator) - 290 if stateful else None
    on = [None if x is None else x.to(DEVICE) for x in (gates, decays, resets, state)]
    forgets, inputs, last, words = (x.cpu() for x in triton._prepare(*on, 7))

    gates, decays = gates.double(), decays.double().masked_fill(resets[..., None], -torch.inf)
    top = torch.full((B, H), -torch.inf, dtype=torch.float64) if state is None else state.double()
    for t in range(T):
        before, top = top, torch.maximum(gates[:, t], top + decays[:, t])
        # Rounding of some hundreds, as often as a sum goes on.
        torch.testing.assert_close(inputs[:, :, t].double(), (gates[:, t] - top).exp(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(forgets[:, :, t].double(), (decays[:, t] + before - top).exp(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(last.double(), top, rtol=1e-6, atol=0)
    logs = [x.double().log() for x in (inputs[..., : T - 1], forgets[..., 1:T], inputs[..., 1:T])]
    around = gates[:, :-1] + decays[:, 1:] - gates[:, 1:]
    off = (logs[0] + logs[1] - logs[2] - around.transpose(1, 2)).abs()
    kept = (torch.stack(logs) > -20).all(0)
    assert T < 100 or kept.sum() > B * H * T / 3
    assert off[kept].numel() == 0 or off[kept].max() < 2e-6
    assert (inputs[..., T:] == 0).all() and ((forgets[..., T : inputs.shape[2]] - 1).abs() < 1e-4).all()
    assert (forgets[..., inputs.shape[2] :] == 0).all() and words.shape == (B * H * 7 + 1,) and not words.any()


WAYS = ["chain", "groups"]


def go(triton, monkeypatch, way):
    """Stretches in a chain, alone or in groups."""
    monkeypatch.setattr(triton.tuning, "processors", lambda x: 1000 if way == "groups" else 0)


@needs_triton
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("T", [1, 16, 17, 63, 65])
def test_triton_keys_and_gradients(small_chunks, monkeypatch, T, way):
    go(small_chunks, monkeypatch, way)
    B, H, D = (1, 2, 12) if T < 60 else (1, 1, 16)
    check("triton", *problem(B, T, H, D, seed=T))


@needs_triton
@pytest.mark.parametrize("pieces, T, way", [
    (1, 50, "chain"), (1, 50, "groups"), pytest.param(8, 127, "chain", marks=pytest.mark.slow),
    *(pytest.param(pieces, 130, "groups", marks=pytest.mark.slow) for pieces in (4, 8)),
])  # fmt: skip
def test_triton_pieces_side_by_side(small_chunks, monkeypatch, pieces, T, way):
    stretches_of(small_chunks, monkeypatch, pieces)
    go(small_chunks, monkeypatch, way)
    check("triton", *problem(1, T, 2, 16, seed=T))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("group", [1, 4, 16])
def test_triton_chain_of_many_stretches(small_chunks, monkeypatch, group):
    """Full groups and a last one that is not, several documents in a stretch and one over several; equal bits each time."""
    go(small_chunks, monkeypatch, "chain")
    stretches_of(small_chunks, monkeypatch, 1)
    monkeypatch.setattr(small_chunks, "GROUPS", (group, group))
    parts, resets = problem(1, 300, 1, 8, seed=group), cut(1, 300, 120, 3, 5, 70)
    check("triton", *parts, resets=resets)
    parts = [x.to(DEVICE) for x in parts]
    run, back = small_chunks._run, small_chunks._run_backward
    first, again = (run(*parts, resets.to(DEVICE), None, None, True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, *(back(torch.ones_like(parts[0]), *parts, *kept[3:]) for kept in (first, again))))


@needs_triton
@pytest.mark.slow
def test_triton_gradients_of_a_document_have_the_same_bits_behind_any_other(small_chunks, monkeypatch):
    """What a document before is makes no difference, not even to sums over a chunk that both lie in."""
    go(small_chunks, monkeypatch, "groups")
    raw, gates, decays = (x.to(DEVICE) for x in problem(1, 90, 2, 16))
    resets, upstream = cut(1, 90, 41, 49).to(DEVICE), torch.randn(1, 90, 2, 16, device=DEVICE)
    found = []
    for factor in (1, -3):
        changed = raw.clone()
        changed[:, :41] *= factor
        found.append(gradients(lambda *x: gated_scan(*x, resets=resets, implementation="triton")[0],
                               changed, gates, decays, upstream)[1])  # fmt: skip
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[:, 41:], other[:, 41:]) and not torch.equal(one[:, :41], other[:, :41])


@needs_triton
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(1, 2, 1, 30), *(pytest.param(n, marks=pytest.mark.slow) for n in ((1,), (33, 31)))])
def test_triton_documents_do_not_mix(small_chunks, monkeypatch, lengths, way):
    go(small_chunks, monkeypatch, way)
    check("triton", *problem(2, 50, 1, 16, seed=3), resets=cut(2, 50, *lengths))


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("way", WAYS)
def test_triton_carries_its_state(small_chunks, monkeypatch, way):
    """From a state to a state, whole and in pieces; the state is the last kbar; an empty one is none."""
    go(small_chunks, monkeypatch, way)
    raw, gates, decays = (x.to(DEVICE) for x in problem(2, 40, 2, 8))
    resets = cut(2, 40, 35, 8).to(DEVICE)
    vector, log_scale = torch.randn(2, 2, 8, device=DEVICE), torch.randn(2, 2, device=DEVICE)
    kbar = log_scale.double().exp()[..., None] * vector.double()
    resets[:, 0] = False
    want, last = truth(raw, gates, decays, resets, kbar)
    with torch.no_grad():
        got, state = gated_scan(raw, gates, decays, resets=resets, state=(vector, log_scale), implementation="triton")
        assert_close(got, want)
        assert_close(state[1].double().exp()[..., None] * state[0], last)
        pieces, state = [], (vector, log_scale)
        for a, b in ((0, 1), (1, 20), (20, 20), (20, 40)):
            keys, state = gated_scan(raw[:, a:b], gates[:, a:b], decays[:, a:b], resets=resets[:, a:b], state=state,
                                     implementation="triton")
            pieces.append(keys)
        assert_close(torch.cat(pieces, 1), want)
        none = torch.zeros_like(vector), torch.full_like(log_scale, -torch.inf)
        plain, _ = gated_scan(raw, gates, decays, implementation="triton")
        assert torch.equal(gated_scan(raw, gates, decays, state=none, implementation="triton")[0], plain)
    upstream = torch.randn(raw.shape, device=DEVICE)
    _, want = gradients(lambda *x: truth(*x, resets, kbar)[0], raw.double(), gates.double(), decays.double(), upstream)
    _, got = gradients(
        lambda *x: gated_scan(*x, resets=resets, state=(vector, log_scale), implementation="triton")[0],
        raw, gates, decays, upstream,
    )
    for name, a, b in zip(("raw keys", "gates", "decays"), got, want, strict=True):
        assert_close(a, b, 1e-4, name, least=0.1)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gate, decay", [(80.0, -0.5), (-80.0, 0.0), (500.0, -500.0), (-500.0, -0.5)])
def test_triton_extreme_gates_and_decays(small_chunks, monkeypatch, gate, decay, way):
    go(small_chunks, monkeypatch, way)
    raw, gates, decays = problem(1, 40, 1, 16)
    gates[:, 5:25] = gate
    gates[:, 12] = 0.25
    decays[:, 3:35] = decay
    check("triton", raw, gates, decays, tolerance=1e-4)


@needs_triton
@pytest.mark.parametrize("part", ["keys", "gradients"])
def test_triton_in_fp16_is_at_most_twice_as_far_off_as_the_reference(small_chunks, part):
    half_as_good(torch.float16, problem(1, 50, 2, 16), part)


def half_as_good(dtype, parts, part):
    upstream = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(9))
    want, want_gradients = gradients(lambda *x: truth(*x)[0], *(x.double() for x in parts), upstream.double())
    found = []
    for form in ("triton", "reference"):
        device = DEVICE if form == "triton" else "cpu"
        got, grads = gradients(lambda *x, form=form: gated_scan(*x, implementation=form)[0],
                               *(x.to(device, dtype) for x in parts), upstream.to(device, dtype))
        pairs = [(got, want)] if part == "keys" else zip(grads, want_gradients, strict=True)
        found.append([float((a.cpu().double() - b).abs().max()) for a, b in pairs])
    for mine, theirs in zip(*found, strict=True):
        assert mine <= 2 * theirs + 1e-6, f"an error of {mine:.2e}, where the reference has {theirs:.2e}"


@needs_triton
def test_triton_zero_raw_keys_and_strided_slices(small_chunks):
    raw, gates, decays = problem(2, 20, 1, 8)
    raw[:, :7] = 0
    raw[1] = 0
    check("triton", raw, gates, decays)
    fused = torch.randn(2, 20, 2 * 8 + 4)
    check("triton", fused[..., :16].unflatten(-1, (2, 8)), fused[..., 16:18], -fused[..., 18:].abs())


@pytest.mark.slow
@needs_triton
def test_a_piece_is_one_warp_s_in_what_triton_compiles():
    """The layout of tiles is the compiler's choice, and its versions differ. Where steps of a column are not one thread's,
    whole tiles [C, W, D] pass through shared memory, 32 times what pieces end with, and a step takes 15 times as long."""
    command = [sys.executable, "-m", "tests.benchmarks.compile_for_hopper", "--only", "gated_scan", "--dtypes", "bf16", "--every"]
    plain = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MM_AUTOTUNE")}
    printed = subprocess.run(command, env=plain, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(\w+)_kernel .*'W': (\d), .*'D': 128}: (\d+) B shared, .* (\d+) B spilled", printed)
    assert {(name, pieces) for name, pieces, *_ in found} == {("forward", "4"), ("backward", "4")}
    for name, pieces, shared, spilled in found:
        assert int(shared) <= int(pieces) * 128 * 4 and int(spilled) <= 256, f"{name}: {shared} B shared, {spilled} B spilled"


@pytest.mark.gpu
@on_a_card
@needs_triton
@pytest.mark.parametrize("B, T, H, D", [(2, 1000, 3, 64), (1, 5000, 2, 128), (40, 300, 8, 32), (2, 333, 4, 256), (1, 70, 1, 96)])
def test_triton_on_a_card(B, T, H, D):
    resets = cut(B, T, 1, 200, 64, 33)
    check("triton", *problem(B, T, H, D, seed=D), resets=resets)
    for dtype in (torch.bfloat16, torch.float16):
        for part in ("keys", "gradients"):
            half_as_good(dtype, problem(B, T, H, D, seed=D), part)

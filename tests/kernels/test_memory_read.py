"""memory_read in all its forms against a loop over the queries in float64, written from the definition."""

import itertools
from dataclasses import dataclass

import pytest
import torch

from mmcore.errors import ConfigError
from mmcore.kernels.linear.cpu import multiplies_bf16
from mmcore.kernels.memory_read import memory_read
from tests.helpers.forms import CPU, DEVICE, ON_GPU, needs_compiler, needs_triton

FORMS = ["reference", "blocked", CPU]
NAMES = ("queries", "keys", "values", "base", "slope", "exponent")


@pytest.fixture(autouse=True)
def unwritten_memory_shows():
    """torch.empty gives NaN, so that output a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def loop(queries, keys, values, base, slope, exponent, starts=None, window=None, delay=1, offset=0):
    """The definition, one query after the other."""
    rows = []
    for b, i in itertools.product(range(queries.shape[0]), range(queries.shape[1])):
        p = offset + i
        hi = min(p - delay, keys.shape[1] - 1)
        lo = max(int(starts[b, i]) if starts is not None else 0, p - window + 1 if window else 0)
        n = max(0, hi - lo + 1)
        if n == 0:
            rows.append(torch.zeros_like(queries[b, i]))
            continue
        beta = slope * float(n) ** exponent + base
        scores = beta[:, None] * torch.einsum("hd,khd->hk", queries[b, i], keys[b, lo : hi + 1])
        rows.append(torch.einsum("hk,khd->hd", torch.softmax(scores, -1), values[b, lo : hi + 1]))
    return torch.stack(rows).view(queries.shape) if rows else torch.zeros_like(queries)


@dataclass
class Case:
    """Shapes and the place of the queries; `documents` are lengths that add up to the number of queries."""

    queries: int
    pairs: int | None = None
    batch: int = 2
    heads: int = 2
    size: int = 16
    window: int | None = None
    delay: int = 1
    offset: int = 0
    documents: tuple[tuple[int, ...], ...] | None = None
    padding: tuple[int, ...] | None = None

    def place(self):
        starts = None
        if self.documents:
            rows = [[sum(row[:n]) for n, length in enumerate(row) for _ in range(length)] for row in self.documents]
            starts = torch.tensor(rows, dtype=torch.int32)
        if self.padding:
            starts = torch.tensor(self.padding, dtype=torch.int32)[:, None].expand(-1, self.queries).contiguous()
        return {"starts": starts, "window": self.window, "delay": self.delay, "offset": self.offset}

    def tensors(self, seed=0):
        """Unit keys and queries, values, bandwidths, and an upstream gradient, all in float64."""
        g = torch.Generator().manual_seed(seed)
        pairs = self.queries if self.pairs is None else self.pairs

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        q = torch.nn.functional.normalize(normal(self.batch, self.queries, self.heads, self.size), dim=-1)
        k = torch.nn.functional.normalize(normal(self.batch, pairs, self.heads, self.size), dim=-1)
        v = normal(self.batch, pairs, self.heads, self.size)
        base, slope = (0.5 * normal(2, self.heads)).exp()
        exponent = 0.6 * torch.rand(self.heads, generator=g, dtype=torch.float64)
        # rounded to fp32, so that every form reads the very same numbers
        inputs = [t.float().double() for t in (q, k, v, base, slope, exponent)]
        return inputs, normal(*q.shape).float().double()


CASES = {
    "one": Case(1),
    "attention": Case(50, delay=0),
    "two": Case(2, delay=1),
    "63": Case(63),
    "64": Case(64, delay=64),
    "65": Case(65, window=64, delay=1),
    "300": Case(300, window=40, delay=3),
    "300 long": Case(300, delay=64),
    "delay beyond the end": Case(20, delay=30),
    "delay beyond the window": Case(70, window=8, delay=8),
    "window of one pair": Case(70, window=2, delay=1),
    "window beyond the end": Case(65, window=256),
    "packed": Case(130, window=32, documents=((1, 1, 63, 64, 1), (130,))),
    "packed long": Case(130, delay=5, documents=((1, 4, 5, 6, 114), (7, 1, 122))),
    "packed 300": Case(300, window=256, documents=((255, 1, 44), (10, 290))),
    "single tokens": Case(9, documents=((1,) * 9, (8, 1))),
    "chunk": Case(33, 100, offset=67, window=50, delay=1),
    "chunk long": Case(65, 365, offset=300, delay=64),
    "chunk before its pairs": Case(40, 50, offset=10, delay=4),
    "fewer pairs": Case(50, 20, delay=1),
    "no pairs": Case(5, 0),
    "no queries": Case(0, 5),
    "padded on the left": Case(70, window=30, padding=(0, 41)),
    "padded chunk": Case(20, 90, offset=70, padding=(75, 90)),
    "head of 64": Case(100, size=64, heads=3, window=31),
    "head of 32": Case(90, size=32, delay=7),
    "head of 128": Case(70, size=128, heads=1),
    "head of 256": Case(66, size=256, heads=1, batch=1, window=50),
    "head of 40": Case(65, size=40, delay=2),
    "head of 5": Case(65, size=5, window=9),
    "decode one": Case(1, 200, offset=200, size=64, heads=4),
    "decode window": Case(1, 200, offset=200, window=65, size=64, heads=4, batch=3),
    "decode empty": Case(1, 10, offset=3, delay=4),
    "decode several": Case(5, 130, offset=128, delay=3, size=32),
    "decode padded": Case(2, 150, offset=149, delay=1, padding=(0, 149), size=24),
    "decode 8": Case(8, 120, offset=113, window=64, size=20, batch=1),
}


def run(case, form, dtype, same=False):
    device = DEVICE if form == "triton" else "cpu"
    inputs, upstream = case.tensors()
    leaves = [t.to(dtype if n < 3 or dtype == torch.float64 else torch.float32) for n, t in enumerate(inputs)]
    leaves = [t.to(device).requires_grad_() for t in leaves]
    if same:
        leaves[1] = leaves[0]
    place = case.place()
    if place["starts"] is not None:
        place["starts"] = place["starts"].to(device)
    out = memory_read(*leaves, **place, implementation=form)
    out.backward(upstream.to(device, dtype))
    grads = [t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves]
    return out.detach().cpu(), [grad.cpu() for grad in grads]


def truth(case, same=False):
    inputs, upstream = case.tensors()
    leaves = [t.requires_grad_() for t in inputs]
    if same:
        leaves[1] = leaves[0]
    out = loop(*leaves, **case.place())
    if out.requires_grad:
        out.backward(upstream)
    return out.detach(), [t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves]


def assert_close(case, form, dtype, tolerance, same=False):
    out, grads = run(case, form, dtype, same)
    true_out, true_grads = truth(case, same)
    assert out.dtype == dtype and out.shape == true_out.shape
    torch.testing.assert_close(out.double(), true_out, rtol=tolerance, atol=tolerance)
    for name, grad, true in zip(NAMES, grads, true_grads, strict=False):
        # relative to the largest entry: a gradient is a sum whose terms cancel
        scale = max(1.0, true.abs().max().item()) if true.numel() else 1.0
        scale *= 30 if name in NAMES[3:] else 1  # one number from thousands of terms of both signs
        torch.testing.assert_close(
            grad.double() / scale, true / scale, rtol=tolerance, atol=tolerance, msg=lambda m: f"grad of {name}: {m}"
        )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("form", FORMS)
def test_output_and_all_gradients(case, form):
    assert_close(case, form, torch.float32, 1e-5)


@pytest.mark.parametrize("name", ["packed", "chunk", "padded chunk"])
@pytest.mark.parametrize("form", ["reference", "blocked", "auto"])
def test_float64(name, form):
    assert_close(CASES[name], form, torch.float64, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["reference", "blocked", "auto"])
def test_half_precision(dtype, form):
    """Inputs and output are rounded to 8 (or 11) bits; scores and sums are not."""
    case = CASES["packed"]
    out, _ = run(case, form, dtype)
    inputs, _ = case.tensors()
    rounded = [t.to(dtype).double() for t in inputs[:3]] + inputs[3:]
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), loop(*rounded, **case.place()), rtol=step, atol=step)


def exact_and_bounds(case, bandwidth, queries, keys, values, upstream):
    """Output and gradients of queries, keys and values in float64 through whole matrices of scores, and of each the most
    that rounding the operands of all products but the scores' to bf16 can change: 2^-7 of a product's size, for two
    numbers off by 2^-8 each, and their product."""
    place, step = case.place(), 2.0**-7 + 2.0**-16
    starts = place["starts"] if place["starts"] is not None else torch.zeros(case.batch, case.queries, dtype=torch.int32)
    at, pair = case.offset + torch.arange(case.queries)[:, None], torch.arange(keys.shape[1])
    low = starts[..., None] if not case.window else torch.maximum(starts[..., None], at - case.window + 1)
    reads = ((pair >= low) & (pair <= at - case.delay))[:, None]  # [B, 1, Tq, Tk]
    count = reads.sum(-1, keepdim=True).double()
    base, slope, exponent = (t[:, None, None] for t in bandwidth)
    beta = torch.where(count > 0, slope * count**exponent + base, 0.0)
    q, k, v, up = (t.transpose(1, 2) for t in (queries, keys, values, upstream))
    scores = torch.where(reads, beta * (q @ k.mT), -torch.inf)
    p = torch.nan_to_num(scores.softmax(-1))
    out, out_bound = p @ v, step * (p @ v.abs())
    slopes = up @ v.mT - (up * out).sum(-1, keepdim=True)
    off = step * (up.abs() @ v.abs().mT) + (up.abs() * out_bound).sum(-1, keepdim=True)
    ds, ds_bound = p * slopes, p * off
    pairs = [
        (out, out_bound), (beta * ds @ k, beta * (ds_bound + step * ds.abs()) @ k.abs()),
        (ds.mT @ (beta * q), (ds_bound + step * ds.abs()).mT @ (beta * q).abs()), (p.mT @ up, step * (p.mT @ up.abs())),
    ]  # fmt: skip
    return [(exact.transpose(1, 2), bound.transpose(1, 2)) for exact, bound in pairs]


@pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no products of bf16")
@pytest.mark.parametrize("sharpness", [1.0, 100.0])
@pytest.mark.parametrize("name", ["one", "two", "63", "65", "300", "300 long", "packed", "packed 300", "chunk", "chunk long",
                                  "padded chunk", "head of 64", "head of 32", "head of 128", "head of 256", "head of 40",
                                  "head of 5"])  # fmt: skip
def test_under_autocast_all_operands_but_the_scores_are_rounded(name, sharpness):
    """Also where bandwidths of hundreds would multiply the rounding of keys."""
    case = CASES[name]
    (*parts, base, slope, exponent), upstream = case.tensors()
    bandwidth = [base * sharpness, slope * sharpness, exponent]
    want = exact_and_bounds(case, bandwidth, *parts, upstream)
    leaves = [t.float().requires_grad_() for t in (*parts, *bandwidth)]
    with torch.autocast("cpu", torch.bfloat16):
        out = memory_read(*leaves, **case.place(), implementation="cpu")
        with torch.no_grad():
            again = memory_read(*leaves, **case.place(), implementation="cpu")
    found = (out.detach(), *torch.autograd.grad(out, leaves, upstream.float())[:3])
    for what, got, (exact, bound) in zip(("output", *NAMES), found, want, strict=False):
        over = (got.double() - exact).abs() - bound - 1e-5 * sharpness * max(1.0, float(exact.abs().max()))
        assert over.max() <= 0, f"{what}: {float(over.max()):.1e} more than rounding allows"
    assert case.queries <= 8 or torch.equal(out.detach(), again)
    if case.queries > 60:
        assert not torch.equal(out.detach(), memory_read(*leaves, **case.place(), implementation="cpu").detach())


@pytest.mark.parametrize("form", ["reference", "blocked", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharpness", [1.0, 3000.0])
def test_under_autocast_scores_are_as_without_it(form, dtype, autocast, sharpness):
    """Also in a backward pass within it, and where bandwidths in fp16 would be infinite and multiply the rounding of keys."""
    case = Case(70, window=30)
    inputs, upstream = case.tensors()
    leaves = [t.to(dtype) for t in inputs[:3]] + [t.float() for t in inputs[3:]]
    leaves[4] *= sharpness
    leaves = [t.requires_grad_() for t in leaves]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", autocast, enabled=enabled):
            out = memory_read(*leaves, **case.place(), implementation=form)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))])
    # all operands but the scores', as a test of its own has it
    rounds = form == "auto" and dtype is torch.float32 and autocast is torch.bfloat16
    for name, without, within in zip(("output", *NAMES), *results, strict=True):
        assert without.dtype == within.dtype and within.isfinite().all()
        if form == "reference":  # in fp64 where it cannot have fp32
            assert float((without - within).abs().max()) <= 0.02 * float(without.abs().max()), name
        elif not rounds:
            assert torch.equal(without, within), name


@pytest.mark.skipif(not multiplies_bf16(), reason="this processor has no products of bf16")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["packed", "packed 300", "300 long", "head of 40", "head of 128"])
def test_rounded_queries_that_are_the_keys_get_both_gradients(name, threads):
    """No more off than rounding allows of either; 5 threads share out the queries of a head. Each run gives the same bits."""
    case = CASES[name]
    (_, keys, values, *bandwidths), upstream = case.tensors()
    (out, out_bound), for_q, for_k, for_v = exact_and_bounds(case, bandwidths, keys, keys, values, upstream)
    want = [(out, out_bound), (for_q[0] + for_k[0], for_q[1] + for_k[1]), for_v]
    k, v, *bandwidths = [t.float().requires_grad_() for t in (keys, values, *bandwidths)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            same = memory_read(k, k, v, *bandwidths, **case.place(), implementation="cpu")
        once, again = (torch.autograd.grad(same, [k, v, *bandwidths], upstream.float(), retain_graph=True) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    for got, (exact, bound) in zip((same.detach(), *once[:2]), want, strict=True):
        assert ((got.double() - exact).abs() <= bound + 1e-5 * max(1.0, float(exact.abs().max()))).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("start, delay", [(62, 4), (70, 4), (64, 0), (64, 1)])
def test_queries_that_read_nothing_between_others_that_do(start, delay, half):
    """64 of them at once: their part of a tile must count as zeros where those on both sides read the same pairs."""
    starts = torch.tensor([[0] * 64 + [1000] * 64 + [start] * 64], dtype=torch.int32)
    case = Case(192, batch=1, heads=1, size=64, delay=delay)
    inputs, upstream = case.tensors()
    leaves = [t.float().requires_grad_() for t in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = memory_read(*leaves, starts=starts, delay=delay, implementation="cpu")
    grads = torch.autograd.grad(out, leaves, upstream.float())
    doubles = [t.requires_grad_() for t in inputs]
    exact = loop(*doubles, starts=starts, delay=delay)
    wanted = (exact.detach(), *torch.autograd.grad(exact, doubles, upstream))
    for n, (got, want) in enumerate(zip((out.detach(), *grads), wanted, strict=True)):
        step = 1e-4 if not half else 0.03 if n < 4 else 0.2  # a bandwidth's gradient is what sums of rounded numbers leave
        torch.testing.assert_close(got.double(), want, rtol=step, atol=step * float(want.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["packed", "300 long", "300", "head of 64", "head of 5"])
def test_queries_that_are_the_keys_get_both_gradients(form, name):
    assert_close(CASES[name], form, torch.float32, 1e-5, same=True)


@needs_compiler
@pytest.mark.parametrize("name, threads, same", [("packed", 5, True), ("65", 2, False), ("decode window", 5, False)])
def test_threads_change_nothing(name, threads, same):
    """With more threads than heads the queries of a head are shared out; each run gives the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(CASES[name], "cpu", torch.float32, 1e-5, same)
        once, again = (run(CASES[name], "cpu", torch.float32, same) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for a, b in zip([once[0], *once[1]], [again[0], *again[1]], strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["other keys", "other queries", "one query"])
def test_queries_and_keys_that_begin_at_one_address(form, layout):
    """They are one tensor only where their strides are the same, too."""
    all_ = torch.nn.functional.normalize(torch.randn(1, 128, 2, 16), dim=-1)
    first, others = all_[:, :64], all_[:, ::2]
    queries, keys = {"other keys": (first, others), "other queries": (others, first),
                     "one query": (all_[:, :1].expand(-1, 64, -1, -1), first)}[layout]  # fmt: skip
    inputs = [queries, keys, torch.randn(1, 64, 2, 16), *(torch.rand(2) + 1 for _ in range(2)), torch.full((2,), 0.3)]
    upstream, found = torch.randn(1, 64, 2, 16), []
    for read, dtype in ((loop, torch.float64), (lambda *inputs: memory_read(*inputs, implementation=form), torch.float32)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]  # of fp32 the memory that they share
        out = read(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, upstream.to(dtype))])
    for exact, got in zip(*found, strict=True):
        assert torch.allclose(got.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [1, 40])
def test_an_empty_memory_gives_exact_zeros(form, queries):
    case = Case(queries, 40, delay=3, documents=((queries,), (1,) * queries))
    out, grads = run(case, form, torch.float32)
    assert out[1].abs().max() == 0 and out[0, :3].abs().max() == 0
    assert grads[0][1].abs().max() == 0 and grads[1][1].abs().max() == 0 and grads[2][1].abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [1, 6, 50])
@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("reading", [0, 1, 2])
def test_the_last_queries_of_a_prompt_read_the_first_pairs_that_are_old_enough(form, queries, offset, reading):
    """Without gradients, as a prompt is read: none of the queries reads anything, or only the last one or two."""
    if reading > queries:
        pytest.skip("as many queries as read")
    delay = offset + queries - reading
    tensors = Case(queries, pairs=offset + queries).tensors()[0]
    with torch.no_grad():
        got = memory_read(*(t.float() for t in tensors), delay=delay, offset=offset, implementation=form)
    assert torch.allclose(got.double(), loop(*tensors, delay=delay, offset=offset), atol=1e-5)
    assert (got[:, : queries - reading] == 0).all() and (got[:, queries - reading :] != 0).any() == (reading > 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [1, 90])
def test_large_bandwidths_stay_finite(form, queries):
    """theta is clipped at 10: beta_0 = beta_1 = exp(10), alpha = 1. The sharpest read is the nearest pair's value."""
    case = Case(queries, 100, offset=100 - queries, size=32)
    inputs, upstream = case.tensors()
    inputs = [t.float() for t in inputs]
    for t, value in zip(inputs[3:], (22026.0, 22026.0, 1.0), strict=False):
        t.fill_(value)
    leaves = [t.requires_grad_() for t in inputs]
    out = memory_read(*leaves, **case.place(), implementation=form)
    out.backward(upstream.float())
    assert out.isfinite().all() and all(t.grad.isfinite().all() for t in leaves)
    q, k, v = (t.detach() for t in leaves[:3])
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    future = torch.arange(100)[None] > torch.arange(100 - queries, 100)[:, None] - 1
    nearest = scores.masked_fill(future, -9.0).argmax(-1)
    expected = torch.gather(v.transpose(1, 2), 2, nearest[..., None].expand(-1, -1, -1, 32)).transpose(1, 2)
    read_any = ~future.all(-1)
    torch.testing.assert_close(out.detach()[:, read_any], expected[:, read_any], rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("queries", [2, 70])
def test_pairs_that_no_query_reads_are_never_touched(queries):
    """NaN and inf before the window and after the delay change no bit of the output or of any gradient."""
    case = Case(queries, 100, offset=100 - queries, window=20, delay=2)
    inputs, upstream = case.tensors()
    results = []
    for low, high in ((None, None), (float("nan"), float("inf"))):
        leaves = [t.float() for t in inputs]
        for t in leaves[1:3] if low else ():
            t[:, : 100 - queries - 19] = low
            t[:, 98:] = high
        leaves = [t.requires_grad_() for t in leaves]
        out = memory_read(*leaves, **case.place(), implementation="cpu")
        out.backward(upstream.float())
        results.append([out.detach(), *(t.grad for t in leaves)])
    for clean, spoiled in zip(*results, strict=False):
        torch.testing.assert_close(clean, spoiled, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [3, 70])
def test_a_nan_is_not_hidden(form, queries):
    case = Case(queries, 80, offset=80 - queries, size=24)
    inputs, _ = case.tensors()
    for spoil in range(3):
        leaves = [t.float() for t in inputs]
        leaves[spoil][0, 0, 0, 0] = float("nan")
        out = memory_read(*leaves, **case.place(), implementation=form)
        assert out[0, 1 if spoil else 0, 0].isnan().any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [1, 4, 50])
@pytest.mark.parametrize("layout", ["time first", "heads first"])
def test_slices_of_a_store_are_read_in_place(form, queries, layout):
    """What the decoder passes: the first n rows of a larger buffer, in either layout."""
    case = Case(queries, 77, offset=77 - queries + 1, heads=3, batch=2, size=32)
    inputs, _ = case.tensors()
    q, k, v, *bandwidths = [t.float() for t in inputs]

    def stored(t):
        if layout == "time first":
            store = torch.full((2, 128, 3, 32), float("nan"))
            store[:, :77] = t
            return store[:, :77]
        store = torch.full((2, 3, 128, 32), float("nan"))
        store[:, :, :77] = t.transpose(1, 2)
        return store[:, :, :77].transpose(1, 2)

    expected = loop(*inputs, **case.place())
    with torch.no_grad():
        out = memory_read(q, stored(k), stored(v), *bandwidths, **case.place(), implementation=form)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [1, 4, 50])
@pytest.mark.parametrize("size", [5, 16, 40, 64])
def test_pairs_in_fp16_are_widened(form, queries, size):
    """Exactly: the result is that of the same numbers in fp32. Only where many queries meet on a processor that multiplies
    bf16 are weights and values rounded to it, and no more off than that allows."""
    case = Case(queries, 77, offset=77 - queries + 1, heads=3, batch=2, size=size)
    inputs, upstream = case.tensors()
    q, k, v, *bandwidths = [t.float() for t in inputs]
    k, v = k.half(), v.half()
    expected = loop(inputs[0], k.double(), v.double(), *inputs[3:], **case.place())
    with torch.no_grad():
        out = memory_read(q, k, v, *bandwidths, **case.place(), implementation=form)
    assert out.dtype == torch.float32
    if form == "cpu" and queries > 8 and multiplies_bf16():
        _, bound = exact_and_bounds(case, inputs[3:], inputs[0], k.double(), v.double(), upstream)[0]
        assert ((out.double() - expected).abs() <= bound + 1e-5).all()
    else:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="one dtype"):
        memory_read(q.requires_grad_(), k, v, *bandwidths, **case.place(), implementation=form)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_equal_the_whole(form):
    """Reading in chunks with an offset, or one by one, gives what one call over the whole text gives."""
    case = Case(90, window=33, delay=2, size=32)
    inputs, _ = case.tensors()
    q, k, v, *bandwidths = [t.float() for t in inputs]
    whole = memory_read(q, k, v, *bandwidths, window=33, delay=2, implementation=form)
    for cuts in ([0, 1, 8, 50, 90], list(range(91))):
        parts = [
            memory_read(q[:, a:b], k[:, :b], v[:, :b], *bandwidths, window=33, delay=2, offset=a, implementation=form)
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=2e-6, atol=2e-6)


def test_wrong_arguments_are_named():
    q = torch.zeros(2, 4, 2, 8)
    one = torch.ones(2)
    with pytest.raises(ConfigError, match=r"keys \(2, 4, 2, 9\).*give \[B, Tq, H, D\]"):
        memory_read(q, torch.zeros(2, 4, 2, 9), torch.zeros(2, 4, 2, 9), one, one, one)
    with pytest.raises(ConfigError, match="float16 keys.*one dtype"):
        memory_read(q, q.half(), q, one, one, one)
    with pytest.raises(ConfigError, match="delay -1.*at least 0"):
        memory_read(q, q, q, one, one, one, delay=-1)
    with pytest.raises(ConfigError, match="one start for each query"):
        memory_read(q, q, q, one, one, one, starts=torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ConfigError, match="no implementation 'fast'"):
        memory_read(q, q, q, one, one, one, implementation="fast")


# Small enough for Triton's interpreter (blocks of 32 queries and 16 pairs there): every kind of place, lengths around
# the blocks, the window and the delay. A card runs all of CASES as well.
TRITON_CASES = {
    "one": Case(1, batch=1, heads=1),
    "attention": Case(50, delay=0, batch=1, heads=1),
    "63": Case(63, delay=5, batch=1, heads=1),
    "64": Case(64, window=16, delay=1, batch=1, heads=1),
    "65": Case(65, window=9, delay=3, batch=1),
    "window of one pair": Case(40, window=2, delay=1, batch=1, heads=1),
    "delay beyond the end": Case(20, delay=30, batch=1, heads=1),
    "packed": Case(48, window=12, documents=((1, 1, 30, 15, 1),), batch=1),
    "packed long": Case(70, delay=3, documents=((1, 2, 3, 4, 60), (40, 30)), heads=1),
    "single tokens": Case(9, documents=((1,) * 9, (8, 1)), heads=1),
    "chunk": Case(20, 50, offset=30, window=9, batch=1),
    "chunk long": Case(33, 80, offset=47, delay=4, batch=1, heads=1),
    "chunk before its pairs": Case(20, 30, offset=10, delay=4, batch=1, heads=1),
    "fewer pairs": Case(40, 20, batch=1, heads=1),
    "no pairs": Case(5, 0, heads=1),
    "no queries": Case(0, 5, heads=1),
    "padded on the left": Case(35, window=10, padding=(20,), batch=1),
    "head of 40": Case(33, size=40, delay=2, batch=1, heads=1),
    "head of 5": Case(33, size=5, window=9, batch=1, heads=1),
}
FEW_CASES = {
    "decode one": Case(1, 80, offset=80, batch=1),
    "decode window": Case(1, 80, offset=80, window=17, batch=2, heads=1),
    "decode empty": Case(1, 10, offset=3, delay=4, batch=1),
    "decode several": Case(5, 60, offset=58, delay=3, batch=1, heads=1),
    "decode padded": Case(2, 40, offset=39, padding=(0, 39), size=24, heads=1),
    "decode far": Case(1, 1100, offset=1100, delay=7, size=8, batch=1, heads=1),
}
on_a_card = pytest.mark.skipif(not ON_GPU, reason="no CUDA device")


@needs_triton
@pytest.mark.parametrize("case", TRITON_CASES.values(), ids=TRITON_CASES.keys())
def test_triton_output_and_all_gradients(case):
    assert_close(case, "triton", torch.float32, 1e-5)


@needs_triton
@pytest.mark.parametrize("name", ["63", "65", "packed", "packed long", "head of 5"])
def test_triton_queries_that_are_the_keys(name):
    assert_close(TRITON_CASES[name], "triton", torch.float32, 1e-5, same=True)


@needs_triton
@pytest.mark.parametrize("wanted", [(), (3,), (4, 5)], ids=str)
def test_triton_bandwidths_that_are_fixed(wanted):
    """Attention's: what asks for no gradient gets none, and the others are as they were."""
    case = TRITON_CASES["65"]
    inputs, upstream = case.tensors()
    leaves = [t.float().to(DEVICE).requires_grad_(n < 3 or n in wanted) for n, t in enumerate(inputs)]
    memory_read(*leaves, **case.place(), implementation="triton").backward(upstream.float().to(DEVICE))
    _, grads = run(case, "triton", torch.float32)
    for n, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad.cpu(), grad, rtol=0, atol=0)
        else:
            assert n >= 3 and leaf.grad is None


@pytest.mark.gpu
@on_a_card
@needs_triton
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("case", [*CASES.values(), Case(1000, window=256), Case(1000, delay=64, size=128)],
                         ids=[*CASES, "1000 short", "1000 long"])
def test_triton_on_a_card(case, same):
    if same and (case.pairs not in (None, case.queries)):
        pytest.skip("queries that are the keys are as many")
    assert_close(case, "triton", torch.float32, 2e-5, same)
    once, again = (run(case, "triton", torch.float32, same) for _ in range(2))
    for a, b in zip([once[0], *once[1]], [again[0], *again[1]], strict=True):
        assert torch.equal(a, b), "two runs must give the same bits"


@pytest.mark.gpu
@on_a_card
@needs_triton
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_in_every_configuration_on_a_card(monkeypatch, size, dtype):
    """Tests run the first configuration, training the one that was fastest."""
    from mmcore.kernels.memory_read import triton, triton_backward

    narrow = dtype is torch.bfloat16
    for tuned in (triton._reader(size, narrow), triton_backward._gatherer(size, narrow)):
        monkeypatch.setattr(tuned, "_tuner", None)
        for config in list(tuned.configs):
            monkeypatch.setattr(tuned, "configs", [config])
            for place in ({"window": 100}, {"delay": 64}):
                case = Case(300, size=size, batch=1, documents=((10, 290),), **place)
                assert_close(case, "triton", dtype, 3e-2 if narrow else 2e-5, same=True)


def errors(case, form, dtype, same):
    """Of the output and of each gradient: the greatest error against float64 on the unrounded numbers."""
    out, grads = run(case, form, dtype, same)
    true_out, true_grads = truth(case, same)
    return [float((a.double() - b).abs().max()) for a, b in zip([out, *grads], [true_out, *true_grads], strict=True)]


def assert_half_as_good(case, dtype):
    for same in (False, True):
        mine, theirs = errors(case, "triton", dtype, same), errors(case, "reference", dtype, same)
        for name, a, b in zip(("output", *NAMES), mine, theirs, strict=True):
            assert a <= 2 * b + 1e-6, f"{name}: an error of {a:.2e}, where the reference has {b:.2e}"


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", ["65", "packed long", "300", "head of 64"])
def test_triton_in_fp16_is_at_most_twice_as_far_off_as_the_reference(name):
    """bf16 needs a card: the interpreter's products of it are wrong."""
    assert_half_as_good({**CASES, **TRITON_CASES}[name], torch.float16)


@pytest.mark.gpu
@on_a_card
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["packed", "300", "300 long", "head of 64", "head of 128", "head of 256", "head of 40"])
def test_triton_in_half_precision_on_a_card(name, dtype):
    assert_half_as_good(CASES[name], dtype)


@needs_triton
@pytest.mark.parametrize("shares", [None, *(pytest.param(n, marks=pytest.mark.slow) for n in (44, 99))])
@pytest.mark.parametrize("case", FEW_CASES.values(), ids=FEW_CASES.keys())
def test_triton_few_queries(case, shares, monkeypatch):
    """Shares of the memory, joined; also more of them than lie in registers at a time, some of them empty."""
    from mmcore.kernels.memory_read import triton, triton_few

    if shares:
        monkeypatch.setattr(triton_few, "share_count", lambda *_: shares)
    inputs, _ = case.tensors()
    q, k, v, *bandwidths = [t.float().to(DEVICE) for t in inputs]
    starts = case.place()["starts"]
    starts = None if starts is None else starts.to(DEVICE)
    with torch.no_grad():
        out = triton.memory_read(q, k, v, *bandwidths, starts, case.window, case.delay, case.offset)
    torch.testing.assert_close(out.double().cpu(), loop(*inputs, **case.place()), rtol=1e-5, atol=1e-5)


@needs_triton
def test_triton_never_touches_pairs_that_no_query_reads():
    case = Case(20, 60, offset=40, window=10, delay=2, batch=1, heads=1)
    inputs, upstream = case.tensors()
    results = []
    for low, high in ((None, None), (float("nan"), float("inf"))):
        leaves = [t.float().to(DEVICE) for t in inputs]
        for t in leaves[1:3] if low else ():
            t[:, :31], t[:, 58:] = low, high
        leaves = [t.requires_grad_() for t in leaves]
        out = memory_read(*leaves, **case.place(), implementation="triton")
        out.backward(upstream.float().to(DEVICE))
        results.append([out.detach(), leaves[0].grad, *(t.grad for t in leaves[3:])])
    for clean, spoiled in zip(*results, strict=True):
        torch.testing.assert_close(clean, spoiled, rtol=0, atol=0)


@needs_triton
def test_triton_large_bandwidths_stay_finite():
    """beta_0 = beta_1 = exp(10), alpha = 1."""
    case = Case(40, batch=1, heads=1)
    inputs, upstream = case.tensors()
    leaves = [t.float().to(DEVICE) for t in inputs]
    for t, value in zip(leaves[3:], (22026.0, 22026.0, 1.0), strict=True):
        t.fill_(value)
    leaves = [t.requires_grad_() for t in leaves]
    out = memory_read(*leaves, implementation="triton")
    out.backward(upstream.float().to(DEVICE))
    assert out.isfinite().all() and all(t.grad.isfinite().all() for t in leaves)


@needs_triton
def test_triton_refuses_float64_and_auto_takes_another_form():
    q = torch.randn(1, 20, 1, 8, dtype=torch.float64, device=DEVICE)
    one = torch.ones(1, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ConfigError, match="fp32 as 'triton'"):
        memory_read(q, q, q, one, one, one, implementation="triton")
    assert memory_read(q, q, q, one, one, one).dtype == torch.float64

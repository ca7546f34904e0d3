"""Shapes: B batch, T time, H heads, D head size. The truth is a float64 loop over equation 9 as it is printed."""

import pytest
import torch

from mmcore.errors import ConfigError
from mmcore.kernels.look_ahead import look_ahead
from tests.helpers.forms import DEVICE, needs_triton
from tests.helpers.poison import poisoned_memory  # noqa: F401

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_form = pytest.mark.parametrize("form", ["reference", "blocked", "cpu"])
NAMES = ("raw values", "mix", "scale", "following")


def truth(raw, mix, scale, following):
    values = []
    for t in range(raw.shape[1]):
        after = raw[:, t + 1] if t + 1 < raw.shape[1] else following
        vbar = mix[:, None] * raw[:, t] + (1 - mix[:, None]) * after
        length = vbar.square().sum(-1, keepdim=True)
        unit = torch.where(length == 0, 0.0, vbar / torch.where(length == 0, 1.0, length).sqrt())
        values.append(scale[:, None] * unit)
    return torch.stack(values, 1)


def problem(B, T, H, D, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(B, T, H, D, generator=generator).to(dtype)
    mix, scale = torch.rand(H, generator=generator), 2 * torch.rand(H, generator=generator) + 0.1
    following = torch.randn(B, H, D, generator=generator).to(dtype)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    return raw, mix.to(precision), scale.to(precision), following


def gradients(function, parts, upstream):
    leaves = [part.detach().requires_grad_() for part in parts]
    values = function(*leaves)
    return values.detach(), torch.autograd.grad(values, leaves, upstream.to(values.dtype))


def check(form, parts, tolerance=1e-5):
    """`parts` without a fourth: nothing follows."""
    upstream = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(9))
    upstream = upstream.to(parts[0].dtype)
    nothing = torch.zeros_like(parts[0][:, 0], dtype=torch.float64)
    want, want_gradients = gradients(lambda *p: truth(*(*p, nothing)[:4]), [part.double() for part in parts], upstream)
    got, got_gradients = gradients(
        lambda raw, mix, scale, following=None: look_ahead(raw, mix, scale, following=following, implementation=form),
        [part.to(DEVICE) for part in parts] if form == "triton" else parts,
        upstream.to(DEVICE) if form == "triton" else upstream,
    )
    got, got_gradients = got.cpu(), [gradient.cpu() for gradient in got_gradients]
    assert got.dtype == parts[0].dtype
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for name, a, b in zip(NAMES[: len(parts)], got_gradients, want_gradients, strict=True):
        error, size = (a.double() - b).abs().max().item(), max(b.abs().max().item(), 0.1)
        assert error <= 10 * tolerance * size, f"{name}: {error:.2e} beside {size:.2e}"


@every_form
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 1000])
def test_values_and_gradients(form, T):
    check(form, problem(2, T, 3, 16, seed=T))


@every_form
@pytest.mark.parametrize("H, D", [(1, 1), (2, 5), (4, 32), (2, 64), (1, 96), (2, 128), (65, 8), (3, 256)])
def test_head_counts_and_sizes(form, H, D):
    check(form, problem(2, 40, H, D, seed=D))


@every_form
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-12)])
def test_dtypes(form, dtype, tolerance):
    if form == "cpu" and dtype == torch.float64:
        with pytest.raises(ConfigError, match="fp32"):
            look_ahead(*problem(1, 3, 1, 4, dtype=dtype)[:3], implementation=form)
        return
    check(form, problem(2, 65, 2, 16, dtype=dtype), tolerance=tolerance)


@every_form
def test_without_following_the_last_position_sees_zeros(form):
    raw, mix, scale, following = problem(2, 20, 3, 16)
    alone = look_ahead(raw, mix, scale, implementation=form)
    zeros = look_ahead(raw, mix, scale, following=torch.zeros_like(following), implementation=form)
    assert torch.equal(alone, zeros)
    assert look_ahead(raw[:, :0], mix, scale, implementation=form).shape == (2, 0, 3, 16)


@every_form
def test_pieces_with_following_equal_the_whole(form):
    raw, mix, scale, following = problem(2, 70, 3, 32)
    whole = look_ahead(raw, mix, scale, following=following, implementation=form)
    pieces = [
        look_ahead(raw[:, a:b], mix, scale, following=raw[:, b] if b < 70 else following, implementation=form)
        for a, b in ((0, 1), (1, 3), (3, 50), (50, 70))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)


@every_form
def test_a_value_sees_its_own_and_the_next_position_only(form):
    raw, mix, scale, following = problem(1, 40, 2, 16)
    before = look_ahead(raw, mix, scale, following=following, implementation=form)
    raw[:, 20] = 5.0
    changed = (look_ahead(raw, mix, scale, following=following, implementation=form) != before).flatten(2).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [19, 20]


@every_form
@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.5, 1.5])
def test_any_mix(form, gamma):
    raw, mix, scale, following = problem(2, 30, 2, 16)
    check(form, (raw, torch.full_like(mix, gamma), scale, following))


@every_form
def test_zero_values_give_zero_and_zero_gradients(form):
    raw, mix, scale, following = problem(2, 30, 2, 16)
    raw[0, 5:9] = 0
    raw[1] = 0
    following[1] = 0
    check(form, (raw, mix, scale, following))
    leaf = raw.requires_grad_()
    values = look_ahead(leaf, mix, scale, following=following, implementation=form)
    values.backward(torch.randn(values.shape))
    assert (values[1] == 0).all() and (leaf.grad[1] == 0).all()


@every_form
def test_slices_of_one_projection_are_read_in_place(form):
    fused = torch.randn(2, 45, 100)
    _, mix, scale, following = problem(2, 45, 3, 16)
    raw = fused[..., 50:98].unflatten(-1, (3, 16))
    check(form, (raw, mix, scale, following))
    check(form, (raw.transpose(0, 1), mix, scale, fused[0, :, :48].unflatten(-1, (3, 16))))
    check(form, (raw.transpose(2, 3).contiguous().transpose(2, 3), mix, scale, following))


@every_form
def test_expanded_upstream_gradients(form):
    raw, mix, scale, _ = problem(2, 33, 2, 16)
    leaf = raw.requires_grad_()
    look_ahead(leaf, mix, scale, implementation=form).sum().backward()
    (want,) = torch.autograd.grad(look_ahead(leaf, mix, scale, implementation="reference").sum(), leaf)
    torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["reference", "blocked"])
def test_gradcheck(form):
    parts = [part.requires_grad_() for part in problem(2, 4, 2, 3, dtype=torch.float64)]
    torch.autograd.gradcheck(lambda a, b, c, d: look_ahead(a, b, c, following=d, implementation=form), parts)


def test_same_bits_from_run_to_run():
    parts = problem(3, 200, 5, 64)
    upstream = torch.randn(parts[0].shape)

    def run(raw, mix, scale, following):
        return look_ahead(raw, mix, scale, following=following, implementation="cpu")

    runs = [gradients(run, parts, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_fp64_runs_by_itself_and_bad_input_is_named():
    raw, mix, scale, following = problem(1, 5, 2, 4)
    assert look_ahead(raw.double(), mix.double(), scale.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"mix \(1,\)"):
        look_ahead(raw, mix[:1], scale)
    with pytest.raises(ValueError, match="following"):
        look_ahead(raw, mix, scale, following=following[:, :1])


@pytest.fixture(params=[None, (2, 16)], ids=["one program", "walks of 2"])
def walks(request, monkeypatch):
    """Backward passes of the size that they have on a card, and in so many positions a walk and numbers at a time that short
    texts are several programs'."""
    from mmcore.kernels.look_ahead import triton

    if request.param:
        monkeypatch.setattr(triton, "WALK", request.param[0])
        monkeypatch.setattr(triton, "WALKERS", request.param[1])
    triton._backward.cache_clear()
    yield
    triton._backward.cache_clear()


@needs_triton
@pytest.mark.parametrize("given", [3, 4], ids=["nothing follows", "something follows"])
@pytest.mark.parametrize("T, D", [
    (1, 5), (8, 8), (9, 8), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((2, 5), (7, 8), (20, 5), (33, 16))),
])  # fmt: skip
def test_triton_values_and_gradients(walks, T, D, given):
    check("triton", problem(2, T, 2, D, seed=T)[:given])


@pytest.mark.parametrize("form", ["reference", "blocked", "cpu", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_value_that_nothing_is_mixed_into_beside_much_larger_ones(form, gamma):
    raw, mix, scale, following = problem(1, 20, 2, 16)
    raw[:, 1::2] *= 1e4
    if form == "triton":
        following *= 1e4
    check(form, (raw, torch.full_like(mix, gamma), scale, following), tolerance=1e-6)


@needs_triton
def test_triton_zeros_slices_and_fp16():
    raw, mix, scale, following = problem(1, 20, 2, 8)
    raw[:, 3:9] = 0
    check("triton", (raw, mix, scale, following))
    fused = torch.randn(2, 9, 40)
    check("triton", (fused[..., 8:24].unflatten(-1, (2, 8)), mix, scale, torch.randn(2, 2, 8)))
    check("triton", problem(1, 20, 2, 16, dtype=torch.float16), tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@needs_triton
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_triton_on_a_card(dtype, tolerance):
    for shape in ((2, 1000, 3, 64), (1, 65, 2, 96), (2, 63, 1, 256)):
        check("triton", problem(*shape, dtype=dtype), tolerance)

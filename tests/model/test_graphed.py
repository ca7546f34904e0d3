"""A Memory Mosaic's step on a GPU: its kernels against the equations (on a CPU in Triton's interpreter), its graph against
the layers one by one."""

import pytest
import torch

from mmcore.kernels.mosaic_step.graphed import GraphedStep
from tests.helpers.forms import DEVICE, ON_GPU, needs_triton
from tests.helpers.models import random_tokens, tiny

pytestmark = needs_triton
ODD = {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 50}


def graphed(model) -> GraphedStep:
    from mmcore.kernels.mosaic_step import triton

    config = model.config
    layers = [layer.step_weights(config.long_term_delay) for layer in model.model.layers]
    return GraphedStep(triton.Step(layers, model.model.norm.weight, model.lm_head.matrix(), config.num_attention_heads,
                                   config.rms_norm_eps))  # fmt: skip


def pair(dtype=torch.float32, **sizes):
    """A model on the device of these tests, and the float64 reference with the very same weights."""
    model, exact = tiny(kernels="auto" if ON_GPU else "blocked", **sizes), tiny(kernels="reference", **sizes)
    if dtype is torch.int8:
        model.quantize()
        for name, module in model.named_modules():
            if hasattr(module, "exact_weight"):
                exact.get_submodule(name).weight.data.copy_(module.exact_weight())
    else:
        model.to(dtype)
        exact.to(dtype)
    return model.to(DEVICE), exact.double()


def through(model, state, tokens, pieces, step=None):
    """Logits [B, T, V] in float64 on the CPU, one token at a time by the step."""
    found = []
    for piece in tokens.to(DEVICE).split(pieces, dim=1):
        state.whole_step = (step or False) if piece.shape[1] == 1 else False
        found.append(model.advance(piece, state, last_only=False))
    return torch.cat(found, 1).double().cpu()


@pytest.mark.slow
@pytest.mark.parametrize("rows, pieces", [(1, [6] + [1] * 11 + [3] + [1] * 4), (3, [6] + [1] * 6 + [3] + [1] * 3),
                                          (20, [14] + [1] * 3)])  # fmt: skip
@pytest.mark.parametrize("sizes", [{}, ODD], ids=["even", "odd"])
def test_triton_step_equals_the_equations(rows, pieces, sizes):
    """Past the window and the delay, with a piece between that the layers read one by one."""
    model, exact = pair(**sizes, num_hidden_layers=2 if rows == 1 else 1)
    tokens = random_tokens(rows, sum(pieces))
    state = model.new_state(rows)
    got = through(model, state, tokens, pieces, graphed(model))
    with torch.no_grad():
        whole = exact(tokens)
    assert (got - whole).abs().max() < 2e-5 * whole.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, rows", [
    (torch.bfloat16, 1), pytest.param(torch.bfloat16, 3, marks=pytest.mark.skipif(
        not ON_GPU, reason="Triton's interpreter multiplies the bits of bf16 tiles")),
    (torch.float16, 3), (torch.int8, 1), (torch.int8, 3),
])  # fmt: skip
def test_triton_step_in_narrow_formats(dtype, rows):
    """Hardly farther from the equations than the layers one by one, in RMS: the step rounds less than they do on a GPU, and
    what it rounds (what waits and what is stored; x, where several rows meet narrow weights) they round on a CPU, too, but
    for x."""
    model, exact = pair(dtype, num_hidden_layers=1)
    tokens = random_tokens(rows, 16)
    with torch.no_grad():
        whole = exact(tokens)

    def error(step):
        state = model.new_state(rows)
        for memory in state.memories.values():
            memory.store.dtype = None  # a CPU keeps narrow models' pairs in fp16
        return (through(model, state, tokens, [8] + [1] * 8, step) - whole).square().mean().sqrt()

    assert error(graphed(model)) < 1.2 * error(None) + 1e-3 * whole.square().mean().sqrt()


@pytest.mark.slow
def test_triton_step_knows_where_padded_rows_begin():
    """At, before and after the first of its tokens."""
    model, exact = pair(num_hidden_layers=1)
    padding = [0, 3, 8, 11]
    tokens = random_tokens(4, 18)
    state = model.new_state(4, padding=torch.tensor(padding, device=DEVICE))
    got = through(model, state, tokens, [8] + [1] * 10, graphed(model))
    for row, pad in enumerate(padding):
        with torch.no_grad():
            alone = exact(tokens[row : row + 1, pad:])[0]
        assert (got[row, pad:] - alone).abs().max() < 2e-5 * alone.abs().max(), f"row {row}"


@pytest.mark.slow
def test_triton_step_goes_through_marks_moves_and_branches():
    """40 tokens: the short store of 36 pairs moves. Then a mark is gone back to, twice, and rows branch off whose long-term
    pairs are lent: the source stays as it was."""
    model, exact = pair(num_hidden_layers=1)
    tokens = random_tokens(1, 44)
    state, step = model.new_state(1), graphed(model)
    got = through(model, state, tokens[:, :40], [30] + [1] * 10, step)
    with torch.no_grad():
        whole = exact(tokens)
    assert (got - whole[:, :40]).abs().max() < 2e-5 * whole.abs().max()
    assert state.memories["layers.0.short_term"].store.first > 0 and step._taken == 10  # which bound the step but once
    mark = state.mark(4)
    for _ in range(2):
        through(model, state, random_tokens(1, 3, seed=5), [1] * 3, step)
        state.rewind(mark)
    branches = model.new_state(2)
    lent = [name for name in state.memories if "long" in name]
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    branches.branch(state, 4, lent)
    following = torch.cat([tokens[:, 40:], random_tokens(1, 4, seed=6)])
    got = through(model, branches, following, [1] * 4, graphed(model))
    with torch.no_grad():
        want = torch.cat([exact(torch.cat([tokens[:, :40], row[None]], 1))[:, 40:] for row in following])
    assert (got - want).abs().max() < 2e-5 * want.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())


@pytest.mark.slow
@pytest.mark.parametrize("rows, sizes", [(1, {}), (2, ODD)], ids=["even", "odd"])
def test_triton_step_takes_a_token_back(rows, sizes):
    """Another token before each, taken back: at the first step, which binds, at ones that move a store, and after a piece. All
    that a state holds is as it was, bit for bit, and so is what follows."""
    model, exact = pair(num_hidden_layers=1, **sizes)
    tokens, wrong = random_tokens(rows, 42).to(DEVICE), random_tokens(rows, 42, seed=9).to(DEVICE)
    with torch.no_grad():
        whole = exact(tokens.cpu())
    state, step, found, asked = model.new_state(rows), graphed(model), [], []
    assert not model.takes_back(state)
    for start, end in ((0, 30), *((n, n + 1) for n in range(30, 38)), (38, 40), (40, 41), (41, 42)):
        state.whole_step = step if end - start == 1 else False
        if end - start == 1:
            asked.append(model.takes_back(state))
            before = {name: tensor.clone() for name, tensor in state.tensors().items()}
            model.advance(wrong[:, start:end], state)
            assert not torch.equal(state.tensors()["layers.0.short_term.pending_raw"], before["layers.0.short_term.pending_raw"])
            state.take_back()
            after = state.tensors()
            for name, tensor in before.items():  # of a window's pairs the oldest may be gone that no query reads again
                same = after[name][:, -tensor.shape[1] :] if name.endswith(("keys", "values")) else after[name]
                assert torch.equal(same, tensor[:, -same.shape[1] :] if name.endswith(("keys", "values")) else tensor), name
        found.append(model.advance(tokens[:, start:end], state, last_only=False))
    assert (torch.cat(found, 1).double().cpu() - whole).abs().max() < 2e-5 * whole.abs().max()
    assert not asked[0] and not all(asked[1:]) and sum(asked) >= 7  # not where a store moves, which is taken back all the same
    model.knocked_out = frozenset(["long_term"])
    assert not model.takes_back(state)  # layer by layer


@pytest.mark.slow
def test_triton_step_notices_pairs_that_a_mark_has_moved():
    """`mark(room)` makes room within the buffer, whose address stays."""
    model, exact = pair(num_hidden_layers=1)
    tokens = random_tokens(1, 50)
    with torch.no_grad():
        whole = exact(tokens)
    state, step = model.new_state(1), graphed(model)
    first = through(model, state, tokens[:, :28], [24] + [1] * 4, step)
    store = state.memories["layers.0.short_term"].store
    keys, used = store.keys, store.used
    mark = state.mark(12)
    assert store.keys is keys and store.used < used
    rest = through(model, state, tokens[:, 28:], [1] * 3 + [7, 1, 1, 10], step)
    assert (torch.cat([first, rest], 1) - whole).abs().max() < 2e-5 * whole.abs().max()
    state.rewind(mark)
    again = through(model, state, tokens[:, 28:], [1, 1, 20], step)
    assert (again - whole[:, 28:]).abs().max() < 2e-5 * whole.abs().max()


@pytest.mark.slow
def test_triton_step_of_large_activations_in_fp16():
    """Two numbers of 60,000 in the stream: their sum of squares and their products with the norm's weight are no fp16."""
    model, _ = pair(torch.float16, num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :2] = 60_000
        model.model.layers[0].memory_norm.weight[:2] = 4
    state = model.new_state(3)
    for memory in state.memories.values():
        memory.store.dtype = None
    got = through(model, state, random_tokens(3, 8), [5, 1, 1, 1], graphed(model))
    assert got.isfinite().all()


@pytest.mark.slow
def test_triton_step_built_in_inference_mode_goes_on_outside_it():
    model, _ = pair(num_hidden_layers=1)
    state, step, tokens = model.new_state(1), graphed(model), random_tokens(1, 4)
    with torch.inference_mode():
        through(model, state, tokens[:, :3], [2, 1], step)
    assert through(model, state, tokens[:, 3:], [1], step).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graphs_on_a_gpu_are_as_right_as_the_layers_one_by_one(dtype, rows):
    """Recorded, replayed while pairs move within their buffer, left for a piece and taken up again; recorded anew where a mark
    made them move to another."""
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 384}
    model, exact = pair(dtype, **sizes)
    tokens = random_tokens(rows, 120)
    with torch.no_grad():
        whole = exact(tokens)
    pieces = [10] + [1] * 60 + [3] + [1] * 47
    plain, recorded, graphs = model.new_state(rows), model.new_state(rows), []
    want = through(model, plain, tokens, pieces)
    found = []
    for piece in tokens.to(DEVICE).split(pieces, dim=1):
        found.append(model.advance(piece, recorded, last_only=False))
        step = recorded.whole_step
        if step is not None and step._graph is not None and step._graph not in graphs:
            graphs.append(step._graph)
        if len(found) == 50:  # once in 28 tokens they move
            recorded.mark()
    assert isinstance(step, GraphedStep) and len(graphs) == 2
    error, theirs = ((logits - whole).square().mean().sqrt() for logits in (torch.cat(found, 1).double().cpu(), want))
    assert error < 1.1 * theirs + 1e-5 * whole.square().mean().sqrt()


def test_a_graph_is_not_asked_for_on_a_cpu():
    """The step in Triton is a GPU's; a CPU has its own."""
    model = tiny()
    state = model.new_state(1)
    for piece in random_tokens(1, 4).split(1, dim=1):
        model.advance(piece, state)
    assert not isinstance(state.whole_step, GraphedStep)


def test_weights_without_an_address_of_their_own_do_not_take_the_step():
    """A sharded weight is a tensor of another class, and its address that of a shard, or none."""
    from mmcore.kernels.mosaic_step import Matrix, triton

    class Sharded(torch.Tensor):
        pass

    assert "no one address" in triton.why_not([Matrix(torch.ones(4, 8).as_subclass(Sharded))])
    assert "contiguous" in triton.why_not([Matrix(torch.ones(8, 4).T)])
    assert "float64" in triton.why_not([Matrix(torch.ones(4, 8, dtype=torch.float64))])

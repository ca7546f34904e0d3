"""A recorded step must hang on nothing but tensors. Here `replay` runs the step's body again with every number of the
host as it was when the step was recorded: what a CUDA graph would do."""

import pytest
import torch

from mmcore.model.graphed import GraphedStep
from tests.helpers.forms import ON_GPU
from tests.helpers.models import random_tokens, tiny


class Frozen(GraphedStep):
    """Records nothing: remembers the host's numbers, and runs the body under them."""

    recordings = 0

    def _record(self):
        self.recordings += 1
        self._then = [(memory.store.used, memory.owner.length) for memory in self._memories]

    def _replay(self):
        now = [(memory.store.used, memory.owner.length) for memory in self._memories]
        self._set(self._then)
        self._body()
        self._set(now)

    def _set(self, numbers):
        for memory, (used, length) in zip(self._memories, numbers, strict=True):
            memory.store.used, memory.owner.length = used, length


@pytest.mark.parametrize("padding", [None, (0, 3, 6)])
def test_a_recorded_step_equals_the_plain_one_through_growth_and_detours(padding):
    """80 tokens: the short store moves, then a chunk is read in another way, a mark is gone back to."""
    model = tiny(kernels="blocked", num_hidden_layers=2)
    tokens = random_tokens(3, 80)
    padding = None if padding is None else torch.tensor(padding)
    plain, other = model.new_state(3, padding=padding), model.new_state(3, padding=padding)
    other.whole_step = step = Frozen(model)
    plain.whole_step = False

    def both(a, b):
        got, want = (model.advance(tokens[:, a:b], state) for state in (other, plain))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    both(0, 10)
    for t in range(10, 50):
        both(t, t + 1)
    both(50, 57)
    marks = other.mark(4), plain.mark(4)
    both(57, 58)
    other.rewind(marks[0])
    plain.rewind(marks[1])
    for t in range(57, 80):
        both(t, t + 1)
    assert 2 <= step.recordings <= 8
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(other.tensors()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no CUDA device")
def test_graphs_on_a_gpu_equal_eager_steps():
    model = tiny(num_hidden_layers=2).cuda()
    tokens = random_tokens(3, 80).cuda()
    plain, recorded = model.new_state(3), model.new_state(3)
    plain.whole_step = False
    model.cuda_graphs = True
    for a, b in ((0, 10), *((t, t + 1) for t in range(10, 60)), (60, 63), *((t, t + 1) for t in range(63, 80))):
        got, want = (model.advance(tokens[:, a:b], state) for state in (recorded, plain))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)

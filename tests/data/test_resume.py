"""Every sample of an epoch exactly once, whatever the number of ranks, and wherever a run is interrupted."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.data.loader import Loader
from mmcore.data.order import Permutation
from mmcore.data.packing import Sample


class Numbered:
    """Samples of two tokens that say which window of the epoch they are, drawn in a shuffled order as text is."""

    def __init__(self, size: int, seed: int):
        self._order = Permutation(size, seed)

    def __getitem__(self, index: int) -> Sample:
        tokens = np.array([self._order[index], 0, 0])
        return Sample(tokens, np.zeros(3, np.int32), np.ones(3, bool))


def steps_of(samples, batch, micro, size, start, stop, count):
    """The windows that `size` ranks draw in the next `count` steps, and the position that a checkpoint would hold."""
    drawn, positions = [[] for _ in range(count)], set()
    for rank in range(size):
        with Loader(samples, batch, micro, rank=rank, world_size=size, start=start, stop=stop) as loader:
            made = 0
            for _, step in zip(range(count), loader, strict=False):
                drawn[made] += [int(token) for part in step for token in part.tokens[:, 0]]
                made += 1
            positions.add((made, loader.position))
    assert len(positions) == 1, "ranks disagree about where they are"
    made, position = positions.pop()
    return drawn[:made], position


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_an_epoch_is_drawn_once_however_it_is_cut(data, seed):
    """Each stretch of a run has its own number of ranks and its own micro-batches; some end before their last step is
    saved, and those steps are made again, by others."""
    batch = data.draw(st.sampled_from((4, 6, 12)), label="batch")
    size = batch * data.draw(st.integers(1, 8), label="steps") - data.draw(st.integers(0, batch - 1), label="short by")
    samples = Numbered(size, seed)
    position, steps = 0, []
    while position < size:
        ranks = data.draw(st.integers(1, min(4, batch)), label="ranks")
        micro = data.draw(st.sampled_from((None, 1, 2, 5)), label="micro-batch")
        count = data.draw(st.integers(1, 5), label="steps made")
        drawn, reached = steps_of(samples, batch, micro, ranks, position, size, count)
        lost = data.draw(st.integers(0, len(drawn) - 1), label="steps lost")
        saved = drawn[: len(drawn) - lost]
        steps += saved
        position = min(size, position + batch * len(saved))
        assert lost or reached == position
    expected = [[samples[i].tokens[0] for i in range(at, min(at + batch, size))] for at in range(0, size, batch)]
    assert [Counter(step) for step in steps] == [Counter(map(int, step)) for step in expected], "not these samples at each step"
    assert Counter(token for step in steps for token in step) == Counter(range(size)), "not every sample exactly once"

"""Batches, rank slices, resuming, and faults in the preparing thread."""

import threading
import time

import numpy as np
import pytest
import torch

from mmcore.data import IGNORED, Loader, Samples
from mmcore.errors import ConfigError, DataError
from tests.data.test_packing import MemoryStream, store


@pytest.fixture
def samples():
    random = np.random.default_rng(3)
    documents = [random.integers(3, 60, size=random.integers(1, 40)).tolist() for _ in range(60)]
    return Samples(store(MemoryStream(documents)), 16, seed=2)


def steps(count, *arguments, **keys):
    with Loader(*arguments, **keys) as loader:
        return [step for step, _ in zip(loader, range(count), strict=False)]


def joined(step) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in step])


def test_batch_is_the_samples_with_labels_one_ahead(samples):
    (step,) = steps(1, samples, 6, 4)
    assert [batch.tokens.shape for batch in step] == [(4, 16), (2, 16)]
    for index in range(6):
        batch, row = step[index // 4], index % 4
        sample = samples[index]
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.documents.dtype == torch.int32
        assert batch.tokens.is_contiguous() and batch.labels.is_contiguous() and batch.documents.is_contiguous()
        for t in range(16):
            assert batch.tokens[row, t] == sample.tokens[t]
            assert batch.documents[row, t] == sample.documents[t]
            counted = sample.trained[t + 1] and sample.documents[t + 1] == sample.documents[t]
            assert batch.labels[row, t] == (sample.tokens[t + 1] if counted else IGNORED)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_together_hold_each_step_whatever_their_number(samples, world_size):
    alone = steps(4, samples, 7, start=14)
    ranks = [steps(4, samples, 7, 2, rank=rank, world_size=world_size, start=14) for rank in range(world_size)]
    for number, step in enumerate(alone):
        together = torch.cat([joined(rank[number]) for rank in ranks])
        assert torch.equal(together, joined(step))
        assert torch.equal(joined(step)[0], torch.from_numpy(samples[14 + 7 * number].tokens[:-1]))


def test_loader_goes_on_from_its_position(samples):
    whole = steps(9, samples, 5)
    with Loader(samples, 5) as loader:
        for _ in zip(range(4), loader, strict=False):
            pass
        time.sleep(0.05)  # the thread is ahead of what was given out
        position = loader.position
    assert position == 20
    for expected, step in zip(whole[4:], steps(5, samples, 5, start=position), strict=True):
        assert torch.equal(joined(expected), joined(step))


def test_stop_ends_with_a_short_step(samples):
    with Loader(samples, 4, stop=10) as loader:
        assert [len(joined(step)) for step in loader] == [4, 4, 2]
        assert loader.position == 10
    assert steps(5, samples, 4, rank=1, world_size=2, start=9, stop=9) == []
    (tail,) = steps(5, samples, 4, rank=0, world_size=2, start=9, stop=10)
    assert tail == []  # one sample for two ranks: the other one has it


def test_fault_in_the_thread_reaches_the_consumer(samples):
    class Faulty:
        def __getitem__(self, index):
            if index >= 8:
                raise DataError("the disk went away")
            return samples[index]

    with Loader(Faulty(), 4) as loader:
        given = iter(loader)
        next(given), next(given)
        with pytest.raises(DataError, match="the disk went away"):
            next(given)
        assert loader.position == 8


def test_close_ends_the_thread_and_can_be_repeated(samples):
    before = threading.active_count()
    loaders = [Loader(samples, 4) for _ in range(5)]
    for loader in loaders:
        next(iter(loader))
        loader.close()
        loader.close()
    assert threading.active_count() == before


def test_impossible_ranks_are_refused(samples):
    with pytest.raises(ConfigError, match="rank 2 is not among 2 ranks"):
        Loader(samples, 4, rank=2, world_size=2)
    with pytest.raises(ConfigError, match=r"training\.batch_size 2 is below the 4 ranks"):
        Loader(samples, 2, world_size=4)

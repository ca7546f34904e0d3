"""Windows and samples against plain loops over the whole stream."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.data.packing import Samples, TextWindows, first_fit
from mmcore.data.store import TokenStore
from mmcore.errors import DataError

BEGIN, END = 1, 2


class MemoryStream:
    """A stream of documents (lists of ids, without frame) that lies in memory."""

    def __init__(self, documents, begin=BEGIN, end=END, name="memory"):
        rows = [[begin, *document, end] for document in documents]
        self.ids = np.array([i for row in rows for i in row], dtype=np.int64)
        self.owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        self.trained = self.ids % 3 != 0
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.tokens, self.documents, self.bytes, self.name = len(self.ids), len(rows), 0, name

    def read(self, start, count):
        return self.ids[start:start + count]

    def read_mask(self, start, count):
        return self.trained[start:start + count]

    def document_lengths(self):
        return self.lengths


def store(*streams, weights=None, kind="text", begin=BEGIN, end=END):
    return TokenStore(tuple(streams), weights, begin, end, kind)


some_documents = st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=30), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(documents=some_documents, length=st.integers(1, 40), one_token=st.booleans())
def test_windows_hold_every_token_once_as_target(documents, length, one_token):
    begin, end = (END, END) if one_token else (BEGIN, END)
    stream = MemoryStream(documents, begin, end)
    windows = TextWindows(stream, length, begin, end)
    targets = []
    for index in range(len(windows)):
        sample = windows[index]
        start = index * length
        real = min(length + 1, stream.tokens - start)
        assert sample.tokens.shape == sample.documents.shape == sample.trained.shape == (length + 1,)
        assert (sample.tokens.dtype, sample.documents.dtype, sample.trained.dtype) == (np.int64, np.int32, bool)
        assert (sample.tokens[:real] == stream.ids[start:start + real]).all()
        owner = stream.owner[start:start + real]
        assert (np.diff(sample.documents[:real]) == np.diff(owner)).all()
        assert sample.documents[0] == 0
        assert sample.trained[:real].all() and not sample.trained[real:].any()
        if real <= length:  # filling is a document of its own
            assert (sample.documents[real:] == sample.documents[real - 1] + 1).all()
        targets += sample.tokens[1:real].tolist()
    assert targets == stream.ids[1:].tolist()


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_first_fit_equals_the_plain_loop(lengths):
    bins, rest = [], []
    for item, size in enumerate(lengths):
        for number, room in enumerate(rest):
            if room >= size:
                bins[number].append(item)
                rest[number] -= size
                break
        else:
            bins.append([item])
            rest.append(20 - size)
    assert first_fit(lengths, 20) == bins


@settings(max_examples=60, deadline=None)
@given(documents=some_documents, length=st.integers(3, 40))
def test_conversations_stay_whole(documents, length):
    begin, end = 0, 60  # both are multiples of 3, which are not learnt
    stream = MemoryStream(documents, begin, end)
    samples = Samples(store(stream, kind="conversations", begin=begin, end=end), length, shuffle=False)
    seen = []
    for index in range(len(samples)):
        sample = samples[index]
        assert len(sample.tokens) == length + 1
        for number in range(sample.documents.max() + 1):
            place = np.flatnonzero(sample.documents == number)
            assert (np.diff(place) == 1).all()
            row = sample.tokens[place].tolist()
            if row[0] == begin:
                which = next(i for i, d in enumerate(documents) if [begin, *d, end][:length + 1] == row and i not in seen)
                seen.append(which)
                start = stream.lengths[:which].sum()
                assert (sample.trained[place] == stream.trained[start:start + len(row)]).all()
            else:
                assert set(row) == {end} and not sample.trained[place].any()
    assert samples.cut == sum(len(d) + 2 > length + 1 for d in documents)
    rows = [[begin, *d, end] for d in documents]
    lost = [n for n, row in enumerate(rows) if len(row) > length + 1 and all(i % 3 == 0 for i in row[:length + 1])]
    assert samples.lost == len(lost)
    assert sorted(seen) == [n for n in range(len(documents)) if n not in lost]


def test_only_where_conversations_are_left_out_a_position_means_another_place_than_before():
    for documents, length, same in (([[3, 6, 9, 12, 15, 4], [3, 4, 6]], 4, False), ([[3, 4, 6, 9, 12]], 4, True), ([[4]], 4, True)):
        data = TokenStore((MemoryStream(documents, 0, 60),), None, 0, 60, "conversations", {"identity": "abc"})
        assert (Samples(data, length).identity == "abc") is same


def test_conversations_that_keep_no_word_to_learn_are_counted_and_refused_where_they_are_all():
    silent, heard = [3, 6, 9, 12, 15, 4], [3, 4, 6]  # what 3 divides is not learnt
    stream = MemoryStream([silent, heard], begin=0, end=60)
    samples = Samples(store(stream, kind="conversations", begin=0, end=60), 4)
    assert (samples.cut, samples.lost, len(samples)) == (1, 1, 1)
    assert samples[0].trained.any()
    with pytest.raises(DataError, match="no conversation has a word of the assistant within its first 4 tokens"):
        Samples(store(MemoryStream([silent] * 3, begin=0, end=60), kind="conversations", begin=0, end=60), 4)
    streams = MemoryStream([silent], begin=0, end=60, name="mute"), MemoryStream([heard], begin=0, end=60)
    assert len(Samples(store(*streams, kind="conversations", begin=0, end=60), 4)) == 1
    assert len(Samples(store(streams[0], kind="conversations", begin=0, end=60), 4, shuffle=False, limit=9)) == 0
    with pytest.raises(DataError, match="mute has a weight, and no conversation there has a word"):
        Samples(store(*streams, weights=(3.0, 1.0), kind="conversations", begin=0, end=60), 4)


def test_an_epoch_holds_every_window_once_and_epochs_differ():
    streams = [MemoryStream([list(range(3, 50))] * n, name=str(n)) for n in (3, 7, 1)]
    samples = Samples(store(*streams), 16, seed=5)
    sizes = [-(-(stream.tokens - 1) // 16) for stream in streams]
    assert len(samples) == sum(sizes)
    everything = sorted((s, w) for s, size in enumerate(sizes) for w in range(size))
    epochs = [[samples.locate(e * len(samples) + i) for i in range(len(samples))] for e in range(3)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [Samples(store(*streams), 16, seed=6).locate(i) for i in range(len(samples))]
    again = Samples(store(*streams), 16, seed=5)
    order = np.random.default_rng(0).permutation(3 * len(samples))
    assert [again.locate(int(i)) for i in order] == [[x for e in epochs for x in e][i] for i in order]
    assert (again[37].tokens == samples[37].tokens).all()


def test_weights_decide_the_shares_and_each_source_has_epochs_of_its_own():
    streams = [MemoryStream([list(range(3, 50))] * n, name=str(n)) for n in (40, 4)]
    samples = Samples(store(*streams, weights=(1.0, 3.0)), 16, seed=1)
    drawn = [samples.locate(i) for i in range(4000)]
    assert sum(source for source, _ in drawn) == pytest.approx(3000, abs=2)
    small = [window for source, window in drawn if source == 1]
    size = -(-(streams[1].tokens - 1) // 16)
    for epoch in range(3):
        assert sorted(small[epoch * size:(epoch + 1) * size]) == list(range(size))
    counts = collections.Counter(source for source, _ in drawn[:100])
    assert counts[1] == pytest.approx(75, abs=2)


def test_validation_is_in_order_and_its_part_is_spread():
    streams = [MemoryStream([list(range(3, 50))] * n, name=str(n)) for n in (6, 3)]
    samples = Samples(store(*streams), 8, shuffle=False)
    whole = [samples.locate(i) for i in range(len(samples))]
    assert whole == sorted(whole)
    assert samples.locate(len(samples)) == whole[0]
    part = Samples(store(*streams), 8, shuffle=False, limit=9)
    assert len(part) == 9
    places = [whole.index(part.locate(i)) for i in range(9)]
    assert places == [i * len(whole) // 9 for i in range(9)]
    assert len(Samples(store(*streams), 8, shuffle=False, limit=10**9)) == len(whole)


def test_stores_without_text_are_refused():
    with pytest.raises(DataError, match="no text to make a sample of"):
        Samples(store(MemoryStream([])), 8)
    with pytest.raises(DataError, match="hollow has a weight but no text left"):
        Samples(store(MemoryStream([[3]]), MemoryStream([], name="hollow"), weights=(1.0, 1.0)), 8)
    with pytest.raises(IndexError):
        Samples(store(MemoryStream([[3]])), 8)[-1]

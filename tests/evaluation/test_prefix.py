"""Sharing what texts have in common, and reading rows side by side, change nothing but the time."""

import pytest
import torch

from mmcore.errors import ConfigError, NonFiniteError
from mmcore.evaluation.prefix import Cursor, shared_length
from mmcore.evaluation.reading import ModelReader, extend
from tests.evaluation.models import BEGIN, ByteTokenizer
from tests.helpers.models import random_tokens, tiny
from tests.helpers.real_data import DATA, needs_data

MODELS = [("memory_mosaics_v2", "auto", ()), ("memory_mosaics_v2", "exact", ()), ("memory_mosaics_v2", "blocked", ()), ("memory_mosaics_v2", "auto", ("long_term",)),
          ("llama", "auto", ()), ("long_short_transformer", "auto", ())]
CONTEXTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [1, 2, 3, 4, 5, 6, 7, 8, 20, 21], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 30],
            [1, 2, 3], [40, 41], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]]
LABELS = [[5, 6, 7], [5, 6], [5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 9], [5]]


def plainly(model, context, continuation):
    """Log-likelihood and greediness from one plain forward pass in float64."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        rows = model(tokens[:, :-1])[0, len(context) - 1:].double().log_softmax(-1)
    return float(rows.gather(1, torch.tensor(continuation)[:, None]).sum()), rows.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("copies", [0, 1 << 30])
@pytest.mark.parametrize(("kind", "kernels", "without"), MODELS)
def test_shared_prefixes_and_rows_change_nothing(kind, kernels, without, copies):
    exact = kernels == "exact"
    model = tiny(kind, "auto" if exact else kernels).without(without).to(torch.float64 if exact else torch.float32)
    cursor = Cursor(model, chunk=4, copies_bytes=copies)
    cursor.seek(CONTEXTS[0][:8])
    for context in CONTEXTS:
        for found, label in zip(cursor.score(context, LABELS), LABELS, strict=True):
            logprob, greedy = plainly(model, context, label)
            assert found.logprob == pytest.approx(logprob, rel=1e-12 if exact else 1e-6, abs=1e-11 if exact else 1e-5)
            assert found.greedy == greedy


def test_what_is_shared_is_read_once():
    model = tiny()
    cursor = Cursor(model, copies_bytes=0)
    head = random_tokens(300, seed=3).tolist()
    cursor.seek(head)
    before = cursor.tokens_read
    for query in range(10):
        cursor.score([*head, query, query + 1], [[3, 4], [3, 5]])
    # two tokens of the query and the labels' common token; their last tokens are never read
    assert before == 300 and cursor.tokens_read - before == 10 * 3


def test_a_long_context_stays_where_it_is():
    """Rewinding hundreds of times moves no stored pair: the buffers are the same objects."""
    model = tiny()
    cursor = Cursor(model, copies_bytes=0)
    head = random_tokens(600, seed=4).tolist()
    cursor.seek(head)
    stores = [memory.store.keys for name, memory in cursor._state.memories.items() if name.endswith("long_term")]
    for query in range(5):
        cursor.score([*head, query], LABELS)
    now = [memory.store.keys for name, memory in cursor._state.memories.items() if name.endswith("long_term")]
    assert all(a is b for a, b in zip(stores, now, strict=True))


@pytest.mark.parametrize("kind", ["memory_mosaics_v2", "long_short_transformer"])
def test_rows_that_are_shorter_than_the_delay_copy_no_long_term_pair(kind):
    model = tiny(kind, long_term_delay=20, long_term_delay_range=(20, 30))
    cursor = Cursor(model, chunk=64, copies_bytes=1 << 20)
    head = random_tokens(600, seed=4).tolist()
    cursor.seek(head)
    groups, read = [], model.advance

    def advance(tokens, state, last_only=True):
        if len(tokens) > 1:
            groups.append([memory.store.keys.stride(0) for name, memory in state.memories.items() if name.endswith("long_term")])
        return read(tokens, state, last_only=last_only)

    model.advance = advance
    labels = [random_tokens(length, seed=length).tolist() for length in (9, 8, 30, 29, 5)]
    found = cursor.score(head, labels)
    del model.advance
    assert [all(stride == 0 for stride in group) for group in groups] == [False, True]  # 30 and 29 tokens; 9, 8 and 5
    for one, label in zip(found, labels, strict=True):
        assert one.logprob == pytest.approx(plainly(model, head, label)[0], rel=1e-5)


def test_the_compiled_step_can_be_rewound():
    """One token at a time, through the step that writes in place."""
    model = tiny(vocab_size=61)
    state = model.new_state(1)
    model.advance(torch.tensor([[1, 2, 3, 4]]), state)
    mark = state.mark(8)
    runs = []
    for _ in range(2):
        runs.append([model.advance(torch.tensor([[token]]), state) for token in (7, 8, 9, 10)])
        state.rewind(mark)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    with torch.no_grad():
        assert torch.allclose(runs[0][-1], model(torch.tensor([[1, 2, 3, 4, 7, 8, 9, 10]]))[:, -1], atol=1e-5)


def test_bad_requests():
    cursor = Cursor(tiny())
    with pytest.raises(ConfigError, match="the prompt is empty"):
        cursor.seek([])
    broken = tiny()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="not numbers"):
        Cursor(broken).score([1, 2], [[3]])


def test_shared_length():
    assert shared_length([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert shared_length([[1]]) == 1 and shared_length([[2], [1]]) == 0 and shared_length([[], [1]]) == 0


class Bytes(ByteTokenizer):
    """The byte tokenizer with what reading asks for besides."""

    class model:
        leading_space = False

    def decode(self, ids, special=False, continues=False):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def test_a_readers_scores_are_those_of_whole_texts():
    model = tiny(vocab_size=258)
    reader = ModelReader(model, Bytes())
    head = "red is warm; blue is cold; " * 6
    reader.hold(head)
    for prompt in (head + "red is", head + "blue is", "something else: red is"):
        scores = reader.choose(prompt, [" warm;", " cold;", " warmer;"])
        for ending, score in zip([" warm;", " cold;", " warmer;"], scores, strict=True):
            assert score == pytest.approx(plainly(model, [BEGIN, *prompt.encode()], list(ending.encode()))[0], abs=2e-5)


def test_completion_is_greedy_and_ends_with_the_text():
    model = tiny(vocab_size=258)
    reader = ModelReader(model, Bytes())
    ids = [BEGIN, *b"once upon"]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    written = ids[10:]
    written = written[: written.index(257)] if 257 in written else written
    text = Bytes().decode(written)
    assert reader.complete("once upon", 6) == text
    ends = [Bytes().decode(written[:n]) for n in range(len(written) + 1)]  # bytes that make no letter are one sign together
    two = next(said for said in ends if len(said) >= 2)
    assert reader.complete("once upon", 6, lambda said: len(said) >= 2) == two and len(text) > len(two)


@needs_data("tokenizers/llama3")
@pytest.mark.parametrize("which", ["llama3/tokenizer.json", "llama2/tokenizer.model"])
def test_extending_an_encoding_equals_encoding_the_whole(which):
    from mmcore.data.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(DATA / "tokenizers" / which)
    book = (DATA / "lmtext/books_children/L_Frank_Baum__The_Wonderful_Wizard_of_Oz.txt").read_text()[5000:9000]
    for cut in range(300, 3000, 197):
        text, more = book[:cut], [book[cut : cut + 40], " and so", "\nservice query: x", "  two", "s", "'s", "...\n\n", "ünder"]
        assert extend(tokenizer, text, tokenizer.encode(text), more) == [tokenizer.encode(text + one) for one in more]


def test_a_memory_without_marks_of_its_own_is_copied():
    """As a model whose states hold more than these know of: rewinding must still be exact."""
    from mmcore.model.state import MemoryState

    class Other(MemoryState):
        """Defines no mark."""

    model = tiny(kernels="blocked")
    for layer in model.model.layers:
        layer.STATE = Other
    cursor = Cursor(model, chunk=4, copies_bytes=0)
    for context in CONTEXTS:
        for found, label in zip(cursor.score(context, LABELS), LABELS, strict=True):
            assert found.logprob == pytest.approx(plainly(model, context, label)[0], rel=1e-6, abs=1e-5)

"""The modules that are shipped with a model, against this project's model and the paper's loops."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'mm[hf]'")

import mmcore  # noqa: E402
from mmcore.checkpoint import hub  # noqa: E402
from mmcore.hf import MemoryMosaicConfig, MemoryMosaicForCausalLM, MemoryMosaicModel, memories_memory_mosaics  # noqa: E402
from mmcore.hf.modeling_memory_mosaics import CACHE  # noqa: E402
from tests.helpers import paper_loops  # noqa: E402
from tests.helpers.models import random_tokens, tiny  # noqa: E402

KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "short_term_window",
        "long_term_delay", "long_term_delay_range", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")


def twin(model) -> MemoryMosaicForCausalLM:
    """The transformers model with a mosaic's configuration and weights."""
    other = MemoryMosaicForCausalLM(MemoryMosaicConfig(**{key: getattr(model.config, key) for key in KEYS}))
    other.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    return other.eval()


@pytest.fixture(scope="module")
def models():
    """A mosaic and its twin in float64, so that any difference is one of arithmetic, not of rounding."""
    ours = tiny().double()
    return ours, twin(ours)


def documents(*lengths: int) -> torch.Tensor:
    return torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)]])


def same(one, other, tolerance=1e-11):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, other.abs().max().item()))


@torch.no_grad()
def test_logits_are_those_of_the_papers_loops(models):
    ours, theirs = models
    ids = [0] * 3 + [4] * 1 + [2] * 13
    expected = paper_loops.logits(paper_loops.exact_weights(ours), random_tokens(17).tolist(), ids, heads=4, layers=2,
                                  window=9, delay=5, eps=ours.config.rms_norm_eps)
    found = theirs(random_tokens(17)[None], document_ids=torch.tensor([ids])).logits[0]
    same(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("time", [1, 2, 4, 5, 6, 8, 9, 10, 31, 32, 33, 70])
def test_logits_equal_around_window_delay_and_chunk(models, time):
    tokens = random_tokens(2, time)
    same(models[1](tokens).logits, models[0](tokens))


@torch.no_grad()
def test_logits_equal_where_sequences_span_many_chunks_and_blocks(models, monkeypatch):
    monkeypatch.setattr(memories_memory_mosaics, "SCAN_CHUNK", 5)
    monkeypatch.setattr(memories_memory_mosaics, "READ_BLOCK", 7)
    tokens = random_tokens(2, 61)
    ids = torch.cat([documents(1, 10, 5, 5, 40), documents(30, 1, 1, 29)])
    same(models[1](tokens).logits, models[0](tokens))
    same(models[1](tokens, document_ids=ids).logits, models[0](tokens, documents=ids))
    positions = torch.cat([torch.arange(n) for n in (1, 10, 5, 5, 40)])[None]
    same(models[1](tokens, position_ids=positions).logits, models[0](tokens, documents=ids[:1].expand(2, -1)))


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(hidden_size=64, short_term_window=20, lively=False)])
def test_logits_equal_in_fp32(changes):
    ours = tiny(**changes)
    tokens, ids = random_tokens(3, 90), documents(50, 3, 37).expand(3, -1)
    theirs = twin(ours)
    same(theirs(tokens).logits, ours(tokens), 1e-5)
    same(theirs(tokens, document_ids=ids).logits, ours(tokens, documents=ids), 1e-5)


@torch.no_grad()
def test_wild_gates_and_decays_lose_nothing():
    exact = tiny().double()
    for layer in exact.model.layers:
        for memory in (layer.short_term, layer.long_term):
            memory.gate_proj.weight *= 300
            memory.decay_proj.weight *= 300
    tokens = random_tokens(2, 70)
    same(twin(exact)(tokens).logits, exact(tokens))
    theirs = twin(exact).float()
    assert theirs(tokens).logits.isfinite().all()


def test_loss_and_gradients_equal(models):
    ours, theirs = models
    tokens, ids = random_tokens(2, 40), documents(12, 28).expand(2, -1)
    labels = tokens.clone()
    labels[:, 20:24] = -100
    loss = theirs(tokens, labels=labels, document_ids=ids).loss
    loss.backward()
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    shifted[:, 11] = -100  # the second document's first token is not predicted from the first document
    expected = ours.loss(tokens, shifted, ids) / (shifted >= 0).sum()
    expected.backward()
    same(loss.double(), expected, 1e-6)  # transformers computes it in fp32
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        same(parameter.grad, mine[name].grad, 1e-6)
    ours.zero_grad()
    theirs.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("embedded", [False, True])
def test_positions_mark_documents_for_the_loss_as_for_the_logits(models, embedded):
    theirs, tokens = models[1], random_tokens(2, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    given = {"inputs_embeds": theirs.model.embed_tokens(tokens)} if embedded else {"input_ids": tokens}
    found = theirs(**given, position_ids=positions, labels=tokens)
    wanted = theirs(tokens, document_ids=documents(8, 12).expand(2, -1), labels=tokens)
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
    whole = theirs(tokens, position_ids=torch.arange(20)[None], labels=tokens)
    assert torch.equal(whole.loss, theirs(tokens, labels=tokens).loss) and not torch.equal(whole.loss, wanted.loss)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 1, 1, 20, 15], [39, 1], [9, 31], [8, 1, 31]])
def test_pieces_with_a_cache_equal_the_whole(models, sizes):
    tokens = random_tokens(2, 40)
    cache, pieces = None, []
    for piece in tokens.split(sizes, 1):
        out = models[1](piece, cache=cache, use_cache=True)
        cache = out[CACHE]
        pieces.append(out.logits)
    assert cache.get_seq_length() == 40 and cache.batch_size == 2
    same(torch.cat(pieces, 1), models[0](tokens))


@torch.no_grad()
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_either_name_of_a_cache_is_taken(models, name):
    tokens = random_tokens(1, 9)
    first = models[1](tokens[:, :8])
    same(models[1](tokens[:, 8:], **{name: first[CACHE]}).logits[:, 0], models[0](tokens)[:, 8])


def test_generate_goes_on_from_a_cache(models):
    theirs, tokens = models[1], random_tokens(1, 12)
    how = {"max_new_tokens": 8, "do_sample": False}
    expected = theirs.generate(tokens, **how)
    assert torch.equal(theirs.generate(tokens, **how, **{CACHE: theirs(tokens[:, :9])[CACHE]}), expected)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}], ids=range(3))
def test_generate_goes_on_from_embeddings(models, options):
    theirs, tokens = models[1], random_tokens(2, 6)
    how = {"max_new_tokens": 4, "do_sample": False, **options}
    embedded = theirs.model.embed_tokens(tokens).detach()
    assert torch.equal(theirs.generate(inputs_embeds=embedded, **how), theirs.generate(tokens, **how)[:, 6:])


def test_generate_keeps_its_cache_while_checkpointing_is_on(models):
    theirs = copy.deepcopy(models[1]).float()
    expected = theirs.generate(random_tokens(1, 6), max_new_tokens=9, do_sample=False)
    switch = "activation" if hasattr(theirs, "activation_checkpointing_enable") else "gradient"
    getattr(theirs, f"{switch}_checkpointing_enable")()
    assert torch.equal(theirs.train().generate(random_tokens(1, 6), max_new_tokens=9, do_sample=False), expected)


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2])
def test_smallest_windows(window):
    ours = tiny(short_term_window=window, long_term_delay=1, long_term_delay_range=(1, 3)).double()
    tokens, cache = random_tokens(1, 9), None
    theirs = twin(ours)
    same(theirs(tokens).logits, ours(tokens))
    for t in range(9):
        out = theirs(tokens[:, t : t + 1], cache=cache, use_cache=True)
        cache = out[CACHE]
    same(out.logits[:, -1], ours(tokens)[:, -1])


def test_gradients_flow_through_a_cache(models):
    theirs, tokens = models[1], random_tokens(1, 24)
    whole = torch.autograd.grad(theirs(tokens).logits[:, -1].sum(), theirs.model.embed_tokens.weight)[0]
    cache = None
    for piece in tokens.split([10, 1, 1, 12], 1):
        out = theirs(piece, cache=cache, use_cache=True)
        cache = out[CACHE]
    same(torch.autograd.grad(out.logits[:, -1].sum(), theirs.model.embed_tokens.weight)[0], whole)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
def test_padded_tokens_count_as_absent(models, side):
    ours, theirs = models
    tokens, mask = random_tokens(4, 30), torch.zeros(4, 30, dtype=torch.long)
    for row, count in enumerate((30, 21, 5, 1)):
        places = {"left": range(30 - count, 30), "right": range(count),
                  "both": range(min(4, 30 - count), min(4, 30 - count) + count),
                  "holes": torch.randperm(30, generator=torch.Generator().manual_seed(row))[:count]}[side]
        mask[row, list(places)] = 1
    out = theirs(tokens, attention_mask=mask, output_hidden_states=True)
    more = random_tokens(4, 3, seed=9)
    longer = torch.cat([mask, torch.ones(4, 3, dtype=torch.long)], 1)
    after = theirs(more, attention_mask=longer, cache=out[CACHE]).logits
    for row in range(4):
        real = mask[row] == 1
        alone = torch.cat([tokens[row][real], more[row]])[None]
        expected = ours(alone)[0]
        same(out.logits[row][real], expected[:-3])
        same(after[row], expected[-3:])
        same(theirs.lm_head(out.hidden_states[-1][row][real]), expected[:-3])
    packed = theirs(tokens, attention_mask=mask, document_ids=documents(9, 21).expand(4, -1), use_cache=False).logits
    for row in range(4):
        real = mask[row] == 1
        expected = ours(tokens[row][real][None], documents=documents(9, 21)[:, real])[0]
        same(packed[row][real], expected)


def test_padding_gets_no_gradient(models):
    theirs, tokens = models[1], random_tokens(1, 12)
    tokens[0, :4] = 60
    tokens[0, 4:] = tokens[0, 4:] % 60
    labels = tokens.masked_fill(tokens == 60, -100)
    loss = theirs(tokens, attention_mask=(tokens != 60).long(), labels=labels).loss
    same(loss, theirs(tokens[:, 4:], labels=tokens[:, 4:]).loss, 1e-6)
    gradient = torch.autograd.grad(loss, theirs.model.embed_tokens.weight)[0]
    assert not gradient[60].any() and gradient[tokens[0, 5]].any()


@torch.no_grad()
def test_a_cache_can_be_copied_reordered_repeated_selected_and_emptied(models):
    theirs, tokens = models[1], random_tokens(3, 14)
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[1, :6] = 0
    cache = theirs(tokens[:, :13], attention_mask=mask[:, :13])[CACHE]
    expected = theirs(tokens, attention_mask=mask, use_cache=False).logits[:, -1]
    order = torch.tensor([2, 1, 1])

    def last(cache, rows):
        return theirs(tokens[rows, 13:], cache=cache).logits[:, -1]

    def changed(method, argument):
        other = copy.deepcopy(cache)
        getattr(other, method)(argument)
        return other

    same(last(changed("reorder_cache", order), order), expected[order])
    same(last(changed("batch_select_indices", order), order), expected[order])
    twice = torch.tensor([0, 0, 1, 1, 2, 2])
    same(last(changed("batch_repeat_interleave", 2), twice), expected[twice])
    same(last(cache, torch.arange(3)), expected)
    cache.reset()
    assert cache.get_seq_length() == 0
    same(theirs(tokens, attention_mask=mask, cache=cache).logits[:, -1], expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    ours = tiny(lively=False)
    tokens, exact = random_tokens(2, 40), ours(random_tokens(2, 40))
    half = twin(ours).to(dtype)
    found = half(tokens).logits
    assert found.dtype == dtype
    same(found.float(), exact, 0.04)
    cache = half(tokens[:, :20])[CACHE]
    assert cache.memories[0][1].keys.dtype == dtype
    same(half(tokens[:, 20:], cache=cache).logits.float(), exact[:, 20:], 0.04)


@torch.no_grad()
def test_autocast_leaves_sums_in_fp32():
    ours = tiny()
    theirs, tokens = twin(ours), random_tokens(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = theirs(tokens).logits
    assert (found.float() - ours(tokens)).abs().mean() < 0.1 * ours(tokens).abs().mean()


def test_weights_start_as_table_6_says():
    torch.manual_seed(0)
    config = MemoryMosaicConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                num_attention_heads=4)
    model = MemoryMosaicForCausalLM(config)
    for name, weight in model.named_parameters():
        depth = int(name.split(".")[2]) if ".layers." in name else 0
        part = name.split(".")[-1]
        if weight.ndim == 2:
            sigma = 1 / (2 * (96 if "down_proj" in name else 64) * (depth + 1)) ** 0.5
            assert weight.abs().max() <= 3 * sigma
            if weight.numel() > 1000:
                assert weight.std().item() == pytest.approx(sigma * 0.9866, rel=0.05), name  # of a normal cut off at 3 sigma
        elif part in ("bandwidth_base", "bandwidth_slope"):
            assert (weight == 1.5).all()
        elif part == "bandwidth_exponent":
            assert (weight == torch.tensor(1 / 3)).all()
        elif part == "value_log_scale":
            assert (weight == 0).all()
        elif part == "value_mix":
            assert ((weight >= 0) & (weight <= 1)).all() and weight.std() > 0
        else:
            assert (weight == 1).all(), name


def test_what_is_saved_can_be_read_by_both(tmp_path):
    for tied in (False, True):
        ours = tiny(tie_word_embeddings=tied, seed=int(tied))
        folder = tmp_path / str(tied)
        twin(ours).save_pretrained(folder)
        tokens = random_tokens(1, 20)
        again, info = MemoryMosaicForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        with torch.no_grad():
            expected = ours(tokens)
            same(again(tokens).logits, expected, 1e-5)
            assert torch.equal(mmcore.load_model(folder)(tokens), expected)
        assert again.config.auto_map == hub.AUTO_MAP
        assert {path.name for path in folder.glob("*.py")} == set(hub.MODULES)
        base, info = MemoryMosaicModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())


def test_vocabulary_can_grow():
    model = twin(tiny())
    with torch.no_grad():
        before = model(random_tokens(1, 5)).logits
        model.resize_token_embeddings(70)
        after = model(random_tokens(1, 5)).logits
    assert after.shape[-1] == 70
    assert torch.equal(after[..., :61], before)


def test_what_is_asked_wrongly_is_said(models):
    theirs = models[1]
    with pytest.raises(ValueError, match="hidden_size 30 does not divide into 4 heads"):
        MemoryMosaicConfig(hidden_size=30, num_attention_heads=4)
    with pytest.raises(ValueError, match="must be at least 1"):
        MemoryMosaicConfig(long_term_delay=0)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        theirs()
    with pytest.raises(ValueError, match=r"attention_mask is \(1, 3\): give"):
        theirs(random_tokens(1, 4), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="packed documents cannot be cached"):
        theirs(random_tokens(1, 4), document_ids=documents(2, 2), use_cache=True)

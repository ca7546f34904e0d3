"""Tokenizers against other libraries, a plain loop of llama2.c's merging, and properties."""

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcore.data import StreamDecoder, Tokenizer, load_tokenizer, train_sentencepiece
from mmcore.data.sentencepiece_model import SentencePieceModel
from mmcore.errors import DataError
from tests.helpers.real_data import DATA, needs_data

AWKWARD = (
    "", " ", "  two  spaces ", "\n\n\tx\r\n", "héllo 日本語 🎉👩‍👩‍👧", "\u2581 literal \u2581\u2581", "a\0b", "\ufeffmark",
    "<|end_of_text|>", "x<|begin_of_text|><|eot_id|> <s></s> <unk>", "<0x41>", "12345 1e-5", "\U0010ffff\u0000",
)
KINDS = ("tokenizers/llama3/tokenizer.json", "tokenizers/llama3/tokenizer.model", "tokenizers/llama2",
         "models/stories260K")


@pytest.fixture(scope="module")
def prose() -> str:
    path = DATA / "lmtext/books_children/Lewis_Carroll__Alice_s_Adventures_in_Wonderland.txt"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    return path.read_text("utf-8")[:60_000] + "".join(AWKWARD).replace("\u2581", "")


SLOW_KINDS = (KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow), *KINDS[2:])

_loaded: dict[str, Tokenizer] = {}


def given_tokenizer(part: str) -> Tokenizer:
    if not (DATA / part).exists():
        pytest.skip(f"{DATA / part} is missing")
    if part not in _loaded:
        _loaded[part] = load_tokenizer(DATA / part)
    return _loaded[part]


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))) | st.sampled_from(AWKWARD))
def test_trained_tokenizer_gives_any_text_back(small_tokenizer, text):
    ids = small_tokenizer.encode(text)
    assert small_tokenizer.decode(ids) == text
    assert not set(ids) & set(small_tokenizer.model.controls.values())
    lengths = small_tokenizer.byte_lengths()
    assert lengths[ids].sum() == len(text.encode())


def test_encoding_by_lines_equals_encoding_whole(small_tokenizer, library_text):
    whole = small_tokenizer.model._processor.encode(library_text)
    assert small_tokenizer.encode(library_text) == whole
    assert small_tokenizer.encode_batch([library_text, "x"]) == [whole, small_tokenizer.encode("x")]


def test_training_gives_the_size_and_names_asked_for(small_tokenizer, library_text, tmp_path):
    assert small_tokenizer.vocab_size == 512
    assert (small_tokenizer.bos_id, small_tokenizer.eos_id) == (1, 2)
    for name in ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        assert small_tokenizer.special(name) is not None
    assert small_tokenizer.special("<|nothing|>") is None
    again = train_sentencepiece([library_text], 512, tmp_path, seed=0)
    assert again.fingerprint == small_tokenizer.fingerprint


@pytest.mark.parametrize("error", [SystemExit(75), KeyboardInterrupt(), DataError("a.txt cannot be read")], ids=repr)
def test_what_ends_the_texts_ends_the_training(error):
    def texts():
        yield "Once upon a time"
        raise error

    with pytest.raises(type(error)) as raised:
        train_sentencepiece(texts(), 300)
    assert raised.value is error


def test_training_says_what_does_not_fit(tmp_path):
    with pytest.raises(DataError, match=r"too short for a vocabulary of 4096: give more text or .* at most \d+"):
        train_sentencepiece(["hello world"], 4096, tmp_path)
    with pytest.raises(DataError, match=r"a vocabulary of 100 cannot hold .* at least \d+"):
        train_sentencepiece(["hello world"], 100, tmp_path)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_sentencepiece([], 300, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("part", SLOW_KINDS)
def test_saved_tokenizer_is_the_same(part, prose, tmp_path):
    tokenizer = given_tokenizer(part)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode(prose) == tokenizer.encode(prose)
    assert (again.bos_id, again.eos_id, again.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size)


@pytest.mark.parametrize("part", SLOW_KINDS)
def test_text_never_becomes_control_tokens(part):
    tokenizer = given_tokenizer(part)
    controls = set(tokenizer.model.controls.values())
    for text in (*AWKWARD, *tokenizer.model.controls):
        ids = tokenizer.encode(text)
        assert not controls & set(ids), text
        if "\u2581" not in text:
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("part", KINDS)
def test_stream_gives_whole_characters_that_join_to_the_text(part, prose):
    tokenizer = given_tokenizer(part)
    ids = [tokenizer.bos_id, *tokenizer.encode(prose), tokenizer.eos_id]
    decoder = StreamDecoder(tokenizer)
    texts = [decoder.push(i) for i in ids]
    assert "\ufffd" not in "".join(texts)
    assert "".join(texts) + decoder.finish() == tokenizer.decode(ids) == prose


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 511), max_size=40), continues=st.booleans())
def test_stream_equals_decoding_for_any_ids(small_tokenizer, ids, continues):
    for tokenizer in (small_tokenizer, _with_leading_space(small_tokenizer)):
        decoder = StreamDecoder(tokenizer, continues=continues)
        texts = [decoder.push(i) for i in ids]
        assert "".join(texts) + decoder.finish() == tokenizer.decode(ids, continues=continues)


def _with_leading_space(tokenizer: Tokenizer) -> Tokenizer:
    other = Tokenizer(SentencePieceModel(tokenizer.model.file_bytes))
    other.model.leading_space = True
    return other


def test_unfinished_character_is_held_back(small_tokenizer):
    first, *rest = "🎉".encode()
    byte = {piece: i for i, piece in enumerate(small_tokenizer.model.pieces)}
    decoder = StreamDecoder(small_tokenizer)
    assert decoder.push(byte[f"<0x{first:02X}>"]) == ""
    assert [decoder.push(byte[f"<0x{b:02X}>"]) for b in rest] == ["", "", "🎉"]
    assert decoder.push(byte["<0xF0>"]) == ""
    assert decoder.finish() == "\ufffd"


def test_llama3_files_agree_with_tiktoken(prose):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    as_json, as_table = given_tokenizer(KINDS[0]), given_tokenizer(KINDS[1])
    assert as_json.model.controls == as_table.model.controls
    assert (as_table.bos_id, as_table.eos_id, as_table.vocab_size) == (128_000, 128_001, 128_256)
    pattern = json.loads(as_json.model.file_bytes)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    truth = tiktoken.Encoding("llama3", pat_str=pattern, special_tokens={},
                              mergeable_ranks=load_tiktoken_bpe(str(DATA / KINDS[1])))
    for text in (prose, *AWKWARD):
        expected = truth.encode(text, disallowed_special=())
        assert as_table.encode(text) == expected
        assert as_json.encode(text) == expected
        assert as_json.decode(expected) == text


def test_llama2_agrees_with_sentencepiece(prose):
    sentencepiece = pytest.importorskip("sentencepiece")
    tokenizer = given_tokenizer("tokenizers/llama2")
    truth = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizers/llama2/tokenizer.model"))
    for text in (prose, *AWKWARD):
        assert tokenizer.encode(text) == truth.encode(text)
        assert tokenizer.decode(truth.encode(text)) == truth.decode(truth.encode(text))
    ids = [1, *truth.encode("Hello world"), 2]
    assert tokenizer.decode(ids) == truth.decode(ids) == "Hello world"
    assert tokenizer.decode(ids[1:], continues=True) == " Hello world"
    assert tokenizer.decode([*ids[1:], 2], special=True) == "Hello world</s></s>"


@needs_data("models/stories260K/tok512.bin")
def test_llama2c_vocabulary_merges_like_llama2c(prose):
    content = (DATA / "models/stories260K/tok512.bin").read_bytes()
    pieces, position = [], 4
    while position < len(content):
        score, length = struct.unpack_from("<fi", content, position)
        pieces.append((content[position + 8:position + 8 + length], score))
        position += 8 + length
    tokenizer = load_tokenizer(DATA / "models/stories260K/tok512.bin")
    assert tokenizer.vocab_size == len(pieces) == 512
    for text in ("Once upon a time, there was a little car named Beep.", "日本 🎉 x", prose[2000:2600], "", "  a \n b"):
        assert tokenizer.encode(text) == _llama2c_encode(text, pieces), text


def _llama2c_encode(text: str, pieces: list[tuple[bytes, float]]) -> list[int]:
    """The greedy merge of llama2.c's run.c: join the best-scored neighbouring pair until no pair is a piece."""
    index = {piece: i for i, (piece, _) in reversed(list(enumerate(pieces)))}
    ids = [index[b" "]] if text else []
    for character in text:
        encoded = character.encode()
        ids += [index[encoded]] if encoded in index else [byte + 3 for byte in encoded]
    while True:
        best = (-1e10, -1, -1)
        for place in range(len(ids) - 1):
            joined = index.get(pieces[ids[place]][0] + pieces[ids[place + 1]][0])
            if joined is not None and pieces[joined][1] > best[0]:
                best = (pieces[joined][1], joined, place)
        if best[1] < 0:
            return ids
        ids[best[2]:best[2] + 2] = [best[1]]


@pytest.mark.parametrize("part", [*SLOW_KINDS[1:], None])
def test_transformers_reads_the_saved_folder_with_the_same_ids(part, prose, small_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = small_tokenizer if part is None else given_tokenizer(part)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = prose.split("<|end_of_text|>")[0]  # theirs turns spelled control tokens into control tokens
    ids = tokenizer.encode(text)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_spelled_control_piece_of_a_unigram_file_stays_text(tmp_path):
    """A unigram vocabulary that holds "<s>" as an ordinary row would match it in text."""
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["\u2581", -1.0]] + [[c, -2.0] for c in "abc<>/s"]
    values = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "truncation": None,
        "padding": None, "pre_tokenizer": None, "decoder": {"type": "Metaspace", "replacement": "\u2581"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert not {1, 2} & set(tokenizer.encode("a<s>b</s>c"))
    assert tokenizer.decode(tokenizer.encode("a<s>b</s>c")) == "a<s>b</s>c"


def test_chat_template_is_saved(small_tokenizer, tmp_path):
    tokenizer = load_tokenizer(small_tokenizer.save(tmp_path)[0].parent)
    assert tokenizer.chat_template is None
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"


def write_templates(tokenizer, folder, value):
    tokenizer.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))


def test_of_several_chat_templates_the_default_one_counts(small_tokenizer, tmp_path):
    rows = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages }}"}]
    write_templates(small_tokenizer, tmp_path, rows)
    found = load_tokenizer(tmp_path)
    assert (found.chat_template, found.other_templates) == ("{{ messages }}", ())
    write_templates(small_tokenizer, tmp_path, rows[:1])
    found = load_tokenizer(tmp_path)
    assert (found.chat_template, found.other_templates) == (None, ("tool_use",))
    assert found.encode("Hello") == small_tokenizer.encode("Hello")
    (tmp_path / "chat_template.jinja").write_text("beside")
    found = load_tokenizer(tmp_path)
    assert (found.chat_template, found.other_templates) == ("beside", ())


@pytest.mark.parametrize("value", [3, {}, [3], ["x"], [{"name": "default"}], [{"name": 3, "template": "x"}],
                                   [{"name": None, "template": "x"}], [{"name": "default", "template": None}]])  # fmt: skip
def test_faulty_chat_templates_are_refused(small_tokenizer, tmp_path, value):
    write_templates(small_tokenizer, tmp_path, value)
    with pytest.raises(DataError, match="chat_template is no text, and no list of names and texts: correct or remove it"):
        load_tokenizer(tmp_path)


def test_a_chat_template_that_is_no_text_is_refused(small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"chat_template.jinja cannot be read .*: get it again or remove it"):
        load_tokenizer(tmp_path)


def test_faulty_tokenizers_are_refused(tmp_path, small_tokenizer):
    with pytest.raises(DataError, match="there is no tokenizer .*nowhere: check the path"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no tokenizer: it needs tokenizer\.json"):
        load_tokenizer(tmp_path)
    for name, content in (("noise.model", bytes(range(256))), ("empty.model", b""), ("half.model",
                          small_tokenizer.model.file_bytes[:1000])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="is none that can be read"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "bad.json").write_text("{\"model\": 3}")
    with pytest.raises(DataError, match=r"no tokenizer\.json that can be read"):
        load_tokenizer(tmp_path / "bad.json")
    model = {"type": "BPE", "continuing_subword_prefix": "long", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    prefixed = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    for text in (prefixed, prefixed.replace("_prefix", "_pref\\u0069x")):  # the library panics over the second
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match="by a prefix|that can be read"):
            load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "bad.tiktoken").write_text("IQ== 0\nIg== one\n")
    with pytest.raises(DataError, match="line 2 is not 'base64 rank'"):
        load_tokenizer(tmp_path / "bad.tiktoken")
    small_tokenizer.save(tmp_path / "named")
    (tmp_path / "named/tokenizer_config.json").write_text('{"bos_token": "<begin>"}')
    with pytest.raises(DataError, match="'<begin>', which the tokenizer lacks"):
        load_tokenizer(tmp_path / "named")


def test_impossible_text_and_ids_are_refused(small_tokenizer):
    with pytest.raises(DataError, match="half of a surrogate pair at character 2"):
        small_tokenizer.encode("ab\ud800")
    for wrong in (512, -1):
        with pytest.raises(DataError, match="512|-1"):
            small_tokenizer.decode([wrong])


GPT2 = DATA / "tokenizers" / "gpt2"
SAMPLES = (
    "Hello world", " two  spaces\n\n\ttab", "don't we'll I'M", "naïve café, œuvre", "Привет, мир", "你好，世界", "नमस्ते", "🙂👩‍👩‍👧 ok",
    "x = [1, 2_000]  # code", "<|endoftext|> is text here", "", "\x00\x7f", "1234567890 3.14",
)


@needs_data("tokenizers/gpt2")
@pytest.mark.parametrize("names", [
    ("encoder.json", "vocab.bpe"), pytest.param(("vocab.json", "merges.txt"), marks=pytest.mark.slow),
])  # fmt: skip
def test_gpt2s_two_files_give_the_ids_of_tiktoken(tmp_path, names):
    """Against OpenAI's own library, built from the same files; whichever file or folder is named."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    for source, name in zip(("encoder.json", "vocab.bpe"), names, strict=True):
        (tmp_path / name).write_bytes((GPT2 / source).read_bytes())
    ranks = data_gym_to_mergeable_bpe_ranks(str(GPT2 / "vocab.bpe"), str(GPT2 / "encoder.json"))
    words = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    theirs = tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    book = (DATA / "lmtext/tinystories").glob("*")
    texts = [*SAMPLES, next(book).read_text("utf-8")[:20_000].replace("<|endoftext|>", "")]
    for named in (tmp_path, tmp_path / names[0], tmp_path / names[1]):
        ours = load_tokenizer(named)
        assert (ours.vocab_size, ours.eos_id, ours.bos_id, ours.frame()) == (50257, 50256, None, (50256, 50256))
        for text in texts:
            assert ours.encode(text) == theirs.encode_ordinary(text)
            assert ours.decode(ours.encode(text)) == text
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode(texts[-1]) == theirs.encode_ordinary(texts[-1]) and again.eos_id == 50256


@pytest.mark.parametrize(("vocabulary", "merges", "message"), [
    (b"[]", b"", "does not number its rows"), (b'{"a": 1}', b"", "does not number its rows"), (b'{"a": 0, "b": 0}', b"", "one id to two rows"),
    (b'{"\\ud800": 0}', b"", "half of a surrogate pair"),
    (b'{"a": true}', b"", "does not number its rows"), (b"{", b"", "no JSON"), (b"\xff", b"", "no JSON"), (b'{"a": 0}', b"\xff", "no text"),
    (b'{"a": 0, "b": 1}', b"#version: 0.2\na b\n", "which its vocabulary lacks"), (b'{"a": 0}', b"a\n", "which its vocabulary lacks"),
])
def test_gpt2_files_that_cannot_be(tmp_path, vocabulary, merges, message):
    (tmp_path / "encoder.json").write_bytes(vocabulary)
    (tmp_path / "vocab.bpe").write_bytes(merges)
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_half_of_a_gpt2_tokenizer_is_named(tmp_path):
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(DataError, match="vocab.bpe"):
        load_tokenizer(tmp_path / "encoder.json")

"""Conversations as tokens: format, mask, template, and what is refused."""

import importlib
import json

import pytest

from mmcore.config import DataConfig, SourceConfig
from mmcore.data import CHAT_TEMPLATE, ChatFormat, Loader, Samples, Tokenizer, load_tokenizer, prepare
from mmcore.data.conversations import check_messages
from mmcore.data.documents import open_source
from mmcore.data.huggingface_tokenizer import _byte_letters, from_gpt2, from_json
from mmcore.data.tokenizer import CHAT_TOKENS
from mmcore.errors import ConfigError, DataError
from tests.data.test_corpus import identity_of
from tests.helpers.real_data import DATA, needs_data

MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A mosaic.\n\nOf memories."}, {"role": "user", "content": "Bye <|eot_id|>"},
    {"role": "assistant", "content": "Bye!"},
]
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.fixture(scope="module")
def pair_tokenizer():
    """GPT-2's way to cut text, by which two line breaks are one token at the end of a text and two before a word."""
    rows = [*(_byte_letters()[byte] for byte in range(256)), "\u010a\u010a", "<|endoftext|>"]
    model = from_gpt2(json.dumps({row: i for i, row in enumerate(rows)}).encode(), "\u010a \u010a".encode(), "pairs")
    values = json.loads(model.file_bytes)
    values["added_tokens"] += [values["added_tokens"][0] | {"id": 258 + n, "content": name} for n, name in enumerate(CHAT_TOKENS)]
    return Tokenizer(from_json(json.dumps(values).encode(), {}, "pairs"))


def test_mask_is_the_assistants_words_and_their_end(small_tokenizer):
    ids, trained = ChatFormat(small_tokenizer).conversation(MESSAGES)
    assert len(ids) == len(trained)
    assert (ids[0], ids[-1]) == (small_tokenizer.bos_id, small_tokenizer.eos_id)
    words = [i for i, counted in zip(ids, trained, strict=True) if counted]
    eot = small_tokenizer.special("<|eot_id|>")
    expected = [*small_tokenizer.encode("A mosaic.\n\nOf memories."), eot, *small_tokenizer.encode("Bye!"), eot]
    assert words == expected
    assert ids.count(eot) == len(MESSAGES)  # the one that the user spelled is text
    text = small_tokenizer.decode(ids, special=True)
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\nBye!<|eot_id|><|end_of_text|>")


def test_prompt_is_the_beginning_of_the_conversation(small_tokenizer):
    chat = ChatFormat(small_tokenizer)
    whole, trained = chat.conversation(MESSAGES)
    prompt = chat.prompt(MESSAGES[:2])
    assert whole[:len(prompt)] == prompt
    assert trained.index(True) == len(prompt)


def test_text_is_encoded_as_in_the_whole_and_answers_as_they_are_asked_for(pair_tokenizer):
    chat, pair = ChatFormat(pair_tokenizer), pair_tokenizer.encode("\n\n")
    assert len(pair) == 1
    for text in ("Who?", "\nWho?", " \n\n", ""):
        row = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        ids, trained = chat.conversation(row)
        asked = [chat.header_start, *pair_tokenizer.encode("assistant"), chat.header_end, *pair]
        words = [*pair_tokenizer.encode(text), chat.end_of_turn]
        first = [chat.header_start, *pair_tokenizer.encode("user"), chat.header_end, *pair_tokenizer.encode("\n\n" + text)]
        assert ids == [257, *first, chat.end_of_turn, *asked, *words, 257]
        assert chat.prompt(row[:1]) == ids[: trained.index(True)]
        assert [i for i, counted in zip(ids, trained, strict=True) if counted] == words


@pytest.mark.parametrize(("which", "content", "weight", "version"), [
    ("small", "Who?", 1, 1), ("small", "\nWho?", 1, 1), ("small", "Who?", 0, 2),
    ("pair", "Who?", 1, 3), ("pair", "Who?", 0, 3), ("pair", " Who?", 0, 2), ("pair", " Who?", 1, 1),
])  # fmt: skip
def test_runs_begun_before_go_on_where_the_tokens_are_the_same(which, content, weight, version, request, tmp_path):
    """The identity by which a run knows its data is that of the first version that gave them; 3 encodes texts as a whole."""
    answers = [{"role": "assistant", "content": "me", "weight": given} for given in (weight, 1)]
    write(tmp_path / "a.jsonl", [[{"role": "user", "content": content}, *answers]])
    tokenizer = request.getfixturevalue(f"{which}_tokenizer")
    source = SourceConfig(str(tmp_path / "a.jsonl"))
    data = DataConfig(sources=(source,), kind="conversations", cache=str(tmp_path / "cache"), validation_fraction=0.0)
    corpus = prepare(data, tokenizer)
    known = identity_of(corpus, tmp_path / "a.jsonl", tokenizer, format=version, kind="conversations")
    assert corpus.fingerprint["identity"] == known


def test_template_writes_the_same_text(small_tokenizer):
    jinja2 = pytest.importorskip("jinja2.sandbox")
    template = jinja2.ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    plain = [m for m in MESSAGES if "<|" not in m["content"]]
    chat = ChatFormat(small_tokenizer)
    ids, _ = chat.conversation(plain)
    text = template.render(messages=plain, bos_token="<|begin_of_text|>", add_generation_prompt=False)
    assert small_tokenizer.decode(ids[:-1], special=True) == text
    asked = template.render(messages=plain[:2], bos_token="<|begin_of_text|>", add_generation_prompt=True)
    assert small_tokenizer.decode(chat.prompt(plain[:2]), special=True) == asked


@pytest.mark.slow
@needs_data("tokenizers/llama3/tokenizer.json")
def test_transformers_applies_the_template_to_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(DATA / "tokenizers/llama3/tokenizer.json")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    plain = [m for m in MESSAGES if "<|" not in m["content"]]
    ids, _ = ChatFormat(tokenizer).conversation(plain)
    assert theirs.apply_chat_template(plain, return_dict=False) == ids[:-1]


@needs_data("tokenizers/llama2")
def test_tokenizer_without_chat_tokens_is_refused():
    with pytest.raises(DataError, match=r"has no token <\|start_header_id\|>, which conversations need: use a tokenizer"):
        ChatFormat(load_tokenizer(DATA / "tokenizers/llama2"))


@pytest.mark.parametrize(("messages", "message"), [
    (None, "messages must be a list"), ([], "at least one message"), (["hi"], "message 1 is no object"),
    ([{"role": "bot", "content": "x"}], "message 1 has the role 'bot': use one of system, user, assistant"),
    ([{"role": "user", "content": 3}], "the content of message 1 must be text"),
    ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "message 2 is a system message"),
    ([{"role": "user", "content": "x"}], "no assistant message, so there is nothing to learn"),
    ([CALL | {"content": ""}], r"message 1 calls a tool \(tool_calls\), which mm cannot learn: remove the row, or write"),
    ([CALL | {"content": None}], r"message 1 calls a tool \(tool_calls\), which mm cannot learn: remove the row, or write"),
    ([{"role": "assistant", "content": None, "function_call": {"name": "f"}}], r"message 1 calls a tool \(function_call\)"),
    ([{"role": "assistant", "content": "x", "reasoning_content": "y"}], "message 1 has reasoning_content, which mm does not"),
    ([{"role": "assistant", "content": "x", "weight": 0.5}], "message 1 has the weight 0.5: give 0"),
    ([{"role": "assistant", "content": "x", "weight": 0}], "gives every answer the weight 0, so there is nothing to learn"),
])
def test_faulty_rows_are_named(messages, message):
    with pytest.raises(DataError, match=f"f.jsonl, line 7.*{message}"):
        check_messages(messages, "f.jsonl, line 7")


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_what_stands_beside_the_messages_is_read_or_refused(tmp_path, ending):
    def read(*rows):
        path = tmp_path / f"a.{ending}"
        if ending == "parquet":
            table = pytest.importorskip("pyarrow").Table.from_pylist([dict.fromkeys(rows[-1]) | row for row in rows])
            importlib.import_module("pyarrow.parquet").write_table(table, path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [json.loads(d.text) for d in open_source(SourceConfig(str(path)), "conversations").documents()]

    talk, system = MESSAGES[1:3], {"role": "system", "content": "You are a pirate"}
    plain = {"messages": talk, "system": "", "tools": [], "id": 3}
    assert read({"system": "You are a pirate", "messages": talk}, plain) == [[system, *talk], talk]
    empty = {"messages": [system, *talk], "system": system["content"], "tools": "[]", "functions": " "}
    assert read({"messages": talk, "system": " \n"}, empty) == [talk, [system, *talk]]
    for row, told in [
        ({"system": "x", "messages": MESSAGES}, "2 has a system message and another system beside the messages: leave one of them out"),
        ({"system": ["x"], "messages": talk}, "2: system must be text"),
        ({"messages": talk, "tools": [{"name": "f"}]}, r"2 offers tools \(tools\), which mm cannot learn to call: remove the row"),
        ({"messages": talk, "functions": [{"name": "f"}]}, r"2 offers tools \(functions\), which mm cannot learn to call"),
    ]:
        with pytest.raises(DataError, match=rf"a\.{ending}, (line|row) {told}"):
            read({"messages": talk, "id": 3}, row)


def test_conversations_from_file_to_batch(small_tokenizer, tmp_path):
    rows = [
        {"id": n, "messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "word " * (n % 9)}]}
        for n in range(40)
    ]
    rows.append({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "long " * 300}]})
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(sources=(SourceConfig(str(tmp_path / "chat.jsonl")),), kind="conversations",
                      cache=str(tmp_path / "cache"), validation_fraction=0.1)
    corpus = prepare(data, small_tokenizer)
    assert corpus.train.documents + corpus.validation.documents == 41
    samples = Samples(corpus.train, 128)
    assert samples.cut == 1
    found = []
    with Loader(samples, 1, stop=len(samples)) as loader:
        for (batch,) in loader:
            kept = batch.labels[0] != -100
            assert kept.any()
            found += batch.labels[0][kept].tolist()
    eot = small_tokenizer.special("<|eot_id|>")
    assert found.count(eot) == corpus.train.documents - samples.cut
    assert small_tokenizer.bos_id not in found and small_tokenizer.eos_id not in found
    said = small_tokenizer.decode(found, special=True).replace("<|eot_id|>", " ").split()
    assert set(said) <= {"word", "long", "lonword", "loword", "lword", "longword", "l", "lo", "lon"}  # the long one is cut


def write(path, rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def learnt(path, tokenizer, cache):
    """What a file teaches: the text of every token that the loss counts."""
    data = DataConfig(sources=(SourceConfig(str(path)),), kind="conversations", cache=str(cache), validation_fraction=0.0)
    (stream,) = prepare(data, tokenizer).train.streams
    ids, counted = stream.read(0, stream.tokens), stream.read_mask(0, stream.tokens)
    return tokenizer.decode(ids[counted].tolist(), special=True)


def test_an_answer_of_weight_0_is_read_and_not_learnt(small_tokenizer, tmp_path):
    """As in OpenAI's format; what has the weight of every other message, or an empty list of calls, is as without."""
    row = [
        {"role": "user", "content": "first question", "weight": 0}, {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "second question", "weight": 1},
        {"role": "assistant", "content": "right", "weight": 1, "tool_calls": [], "function_call": None},
    ]
    assert learnt(write(tmp_path / "a.jsonl", [row]), small_tokenizer, tmp_path / "cache") == "right<|eot_id|>"
    plain = [{"role": message["role"], "content": message["content"]} for message in row]
    assert check_messages(row, "a row") == [plain[0], plain[1] | {"weight": 0}, *plain[2:]]
    chat = ChatFormat(small_tokenizer)
    assert chat.conversation(check_messages(row, "a row"))[0] == chat.conversation(plain)[0]  # the model reads all of it


def test_a_source_whose_answers_are_all_blank_is_refused(small_tokenizer, tmp_path):
    blank = [[{"role": "user", "content": f"x {n}"}, {"role": "assistant", "content": " \n"[:n % 3]}] for n in range(9)]
    blank.append([{"role": "user", "content": "x"}, {"role": "assistant", "content": "w", "weight": 0}, *blank[0]])
    with pytest.raises(DataError, match=r"every answer in .*blank\.jsonl is blank, so there is nothing to learn from it"):
        learnt(write(tmp_path / "blank.jsonl", blank), small_tokenizer, tmp_path / "cache")
    said = [*blank, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "said"}]]
    assert learnt(write(tmp_path / "said.jsonl", said), small_tokenizer, tmp_path / "cache").endswith("said<|eot_id|>")


def test_a_text_key_of_conversations_is_refused(small_tokenizer, tmp_path):
    source = SourceConfig(str(write(tmp_path / "a.jsonl", [MESSAGES])), text_key="conversation")
    data = DataConfig(sources=(source,), kind="conversations", cache=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"a\.jsonl has the text_key 'conversation', which conversations do not know: leave"):
        prepare(data, small_tokenizer)

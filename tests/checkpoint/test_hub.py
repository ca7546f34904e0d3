"""What an exported folder holds for transformers, with the tokenizers library as the witness; tests/hf runs the real thing."""

import json

import pytest
import tokenizers

from mmcore.checkpoint import hub
from mmcore.data import CHAT_TEMPLATE, load_tokenizer
from mmcore.errors import CheckpointError
from tests.helpers.real_data import DATA, needs_data
from tests.hf.folders import SCRIPTS, trained_tokenizer

BASE = {"model_type": "memory_mosaics_v2", "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def trained():
    return trained_tokenizer()


def theirs(files) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])


def real_texts() -> list[str]:
    paths = ["lmtext/books_classic", "lmtext/wikitext-2", "lmtext/tinyshakespeare", "qa/xquad"]
    files = [next(p for p in sorted((DATA / path).iterdir()) if p.is_file()) for path in paths if (DATA / path).exists()]
    return [file.read_text("utf-8")[:40_000] for file in files] + list(SCRIPTS)


def test_a_mosaics_folder_ships_its_modules_and_points_to_them(trained):
    files = hub.hub_files(BASE, trained)
    assert set(files) == {*hub.MODULES, "generation_config.json", "tokenizer.json", "tokenizer.model",
                          "tokenizer_config.json", "chat_template.jinja"}
    for target in hub.AUTO_MAP.values():
        module, _, name = target.partition(".")
        assert f"class {name}(".encode() in files[f"{module}.py"]
    assert hub.hub_config({"model_type": "memory_mosaics_v2"}, trained) == BASE | {"auto_map": hub.AUTO_MAP}
    assert hub.hub_config({"model_type": "llama"}) == {"model_type": "llama"}
    assert set(hub.hub_files({"model_type": "llama"})) == {"generation_config.json"}


def test_generation_ends_where_texts_and_turns_do(trained):
    def settings(values, tokenizer=None, given=None):
        return json.loads(hub.hub_files(values, tokenizer, given)["generation_config.json"])

    chat = settings(BASE, trained, trained.files())
    assert chat["eos_token_id"] == [2, trained.special("<|eot_id|>")]
    assert chat["do_sample"] and chat["pad_token_id"] == 2
    trained.chat_template = None
    try:
        assert settings(BASE, trained) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    finally:
        trained.chat_template = CHAT_TEMPLATE
    assert settings({"model_type": "llama"}) == {}
    assert settings({"model_type": "llama", "eos_token_id": [7, 8]}) == {"eos_token_id": [7, 8], "pad_token_id": 7}
    stale = {"generation_config.json": b'{"eos_token_id": 2}'}  # of a chat model that an earlier mm tuned on text
    assert settings(BASE, trained, stale)["eos_token_id"] == chat["eos_token_id"]
    source = {"generation_config.json": b'{"temperature": 0.3, "eos_token_id": null}'}
    assert settings(BASE, None, source) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "temperature": 0.3}


@pytest.mark.parametrize("which", ["trained", "tokenizers/llama2", "models/stories260K"])
def test_tokenizer_json_equals_the_sentencepiece_model(which, trained):
    if which != "trained" and not (DATA / which).exists():
        pytest.skip(f"{DATA / which} is missing")
    tokenizer = trained if which == "trained" else load_tokenizer(DATA / which)
    witness = theirs(hub.hub_files(BASE, tokenizer))
    for text in real_texts():
        ids = tokenizer.encode(text)
        assert witness.encode(text, add_special_tokens=False).ids == ids, text[:80]
        assert witness.encode(text).ids == [tokenizer.bos_id, *ids]
        if tokenizer is trained:
            assert witness.decode(ids) == text


@needs_data("tokenizers/llama3")
@pytest.mark.slow
def test_both_forms_of_llama_3_are_exported_with_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'mm[hf]'")
    texts, found = real_texts(), []
    for form in ("tokenizer.json", "tokenizer.model"):
        tokenizer = load_tokenizer(DATA / "tokenizers/llama3" / form)
        tokenizer.chat_template = None
        files = hub.hub_files(BASE, tokenizer)
        witness = theirs(files)
        ids = [tokenizer.encode(text) for text in texts]
        assert [row.ids for row in witness.encode_batch(texts, add_special_tokens=False)] == ids
        assert witness.encode("Hello").ids == [128_000, *tokenizer.encode("Hello")]
        found.append(ids)
        folder = tmp_path / form
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        again = load_tokenizer(folder)
        assert again.fingerprint == tokenizer.fingerprint  # the begin token in front is no part of what it is
        assert again.encode(texts[0]) == ids[0]
        if form == "tokenizer.json":
            real = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
            assert real(texts[0])["input_ids"] == [128_000, *ids[0]]
            assert (real.bos_token_id, real.eos_token_id, real.pad_token_id) == (128_000, 128_001, 128_001)
    assert found[0] == found[1]


def test_files_of_another_program_are_kept(trained):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "model_max_length": 99}
    given = {"tokenizer_config.json": json.dumps(config).encode(), "tokenizer.json": b"{}", "vocab.json": b"[]",
             "generation_config.json": b"{}"}
    assert hub.made_elsewhere(given)
    files = hub.hub_files({"model_type": "llama"}, None, given)
    assert {name: files[name] for name in given} == given | {"generation_config.json": b"{}\n"}
    assert not hub.made_elsewhere(trained.files())
    assert not hub.made_elsewhere({})
    for wrong in (b"nonsense", b"[]", b"[" * 100_000):
        with pytest.raises(CheckpointError, match="tokenizer_config.json"):
            hub.made_elsewhere({"tokenizer_config.json": wrong})


@pytest.mark.parametrize("given", [
    {"temperature": 0.6, "top_k": 20, "do_sample": True, "repetition_penalty": 1.1}, {"do_sample": False}, {},
])  # fmt: skip
def test_settings_of_another_program_are_carried_as_they_are(trained, given):
    """Its weights with our tokenizer too; where nothing else is said, a chat checkpoint of ours is drawn from as mm chat does."""
    def settings(files, values):
        found = json.loads(hub.hub_files(BASE, trained, files | {"generation_config.json": json.dumps(values).encode()})
                           ["generation_config.json"])  # fmt: skip
        return {key: value for key, value in found.items() if not key.endswith("_token_id")}

    theirs, ours = json.loads(trained.files()["tokenizer_config.json"]), trained.files()
    theirs = ours | {"tokenizer_config.json": json.dumps({k: v for k, v in theirs.items() if k != "mm_file"}).encode()}
    ids = {"bos_token_id": 1, "eos_token_id": [2, 5]}
    assert settings(theirs, ids | given) == given
    assert settings(ours, ids | given) == (given or hub.CHAT_SAMPLING)
    assert settings(ours, ids | {"transformers_version": "5"}) == {"transformers_version": "5"}
    named = json.loads(hub.hub_files(BASE, trained, ours, named=True)["generation_config.json"])
    assert not hub.CHAT_SAMPLING.keys() & named.keys(), "a tokenizer that was named says nothing of the weights"


def test_a_tokenizer_that_frames_texts_in_its_own_way_is_left_alone(trained):
    framed = hub.with_begin_token(trained.files()["tokenizer.json"], "<|begin_of_text|>", 1)
    assert tokenizers.Tokenizer.from_buffer(framed).encode("a", "b").ids.count(1) == 2
    assert hub.with_begin_token(framed, "<|end_of_text|>", 2) == framed

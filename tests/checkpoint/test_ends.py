"""Where texts end, in what is converted: the source's word, and the tokenizer's that was asked for."""

import dataclasses
import json

import pytest
import torch

import mmcore
from mmcore.checkpoint.convert import convert_checkpoint
from mmcore.checkpoint.formats import write_exported
from mmcore.data.conversations import CHAT_TEMPLATE
from mmcore.data.sentencepiece_model import train_sentencepiece
from mmcore.errors import CheckpointError, ConfigError
from tests.checkpoint.small import LLAMA, weights

CONFIG = dataclasses.replace(LLAMA, vocab_size=320)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """1 begins, 2 ends, 5 is <|eot_id|>."""
    folder = tmp_path_factory.mktemp("tokenizer")
    found = train_sentencepiece(["Once upon a time there was a cat."] * 20, 300, folder)
    assert (found.bos_id, found.eos_id, found.special("<|eot_id|>")) == (1, 2, 5)
    return folder


def source(folder, config, generation=None):
    path = write_exported(folder / "source", CONFIG, weights(CONFIG), extra=config)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def settings(path, name):
    return json.loads((path / f"{name}.json").read_text())


@pytest.mark.parametrize("config, generation, note", [
    ({"bos_token_id": 7, "eos_token_id": 9}, {"eos_token_id": [9, 11], "pad_token_id": 9, "temperature": 0.5},
     "the source's bos_token_id 7 (now 1) and eos_token_id [9, 11] (now 2) did not fit the tokenizer"),
    ({"bos_token_id": 1, "eos_token_id": 9}, {"temperature": 0.5}, "the source's eos_token_id 9 (now 2) did not fit"),
    ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [2, 9], "temperature": 0.5}, "eos_token_id [2, 9] (now 2)"),
])
@pytest.mark.parametrize("to", ["hf", "train", "torch"])
def test_the_given_tokenizer_decides(tmp_path, tokenizer, config, generation, note, to):
    result = tmp_path / "out.pt" if to == "torch" else tmp_path / "out"
    made = convert_checkpoint(source(tmp_path, config, generation), result, to=to, tokenizer=tokenizer)
    assert [told for told in made.notes if note in told], made.notes
    assert mmcore.load_model(result).stop_ids == {2}
    if to == "hf":
        assert settings(result, "config")["bos_token_id"] == 1
        assert settings(result, "generation_config") == {
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "temperature": 0.5
        }


@pytest.mark.parametrize("config, generation, ends", [
    ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [2, 5], "pad_token_id": 5}, {2, 5}),
    ({"bos_token_id": 1, "eos_token_id": [2, 5]}, None, {2, 5}),
    ({}, {}, {2}),
])
def test_where_the_two_agree_nothing_is_said(tmp_path, tokenizer, config, generation, ends):
    made = convert_checkpoint(source(tmp_path, config, generation), tmp_path / "out", tokenizer=tokenizer)
    assert not [told for told in made.notes if "did not fit" in told]
    assert mmcore.load_model(tmp_path / "out").stop_ids == ends
    if generation:
        assert settings(tmp_path / "out", "generation_config")["pad_token_id"] == 5


def test_a_token_that_ends_a_turn_stays(tmp_path, tokenizer):
    made = convert_checkpoint(source(tmp_path, {"eos_token_id": [5, 9]}), tmp_path / "out", tokenizer=tokenizer)
    assert any("eos_token_id [5, 9] (now [5, 2])" in told for told in made.notes)
    assert mmcore.load_model(tmp_path / "out").stop_ids == {2, 5}


def test_the_begin_token_ends_nothing(tmp_path, tokenizer):
    """Where the source's end token has the number of the tokenizer's begin token."""
    convert_checkpoint(source(tmp_path, {"bos_token_id": 0, "eos_token_id": 1}), tmp_path / "out", tokenizer=tokenizer)
    assert mmcore.load_model(tmp_path / "out").stop_ids == {2}


def test_a_tokenizer_for_chats_ends_turns_too(tmp_path, tokenizer):
    chat = mmcore.data.load_tokenizer(tokenizer)
    chat.chat_template = CHAT_TEMPLATE
    chat.save(tmp_path / "chat")
    convert_checkpoint(source(tmp_path, {"eos_token_id": 9}), tmp_path / "out", tokenizer=tmp_path / "chat")
    assert settings(tmp_path / "out", "generation_config")["eos_token_id"] == [2, 5]


@pytest.mark.parametrize("to", ["hf", "train", "torch"])
def test_ends_of_generation_config_are_kept(tmp_path, to):
    result = tmp_path / "out.pt" if to == "torch" else tmp_path / "out"
    convert_checkpoint(source(tmp_path, {"eos_token_id": 2}, {"eos_token_id": [2, 9]}), result, to=to)
    assert mmcore.load_model(result).stop_ids == {2, 9}


def test_ends_that_are_no_token_ids_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"eos_token_id is \[\[2\]\] and must be a token id: correct or remove it"):
        convert_checkpoint(source(tmp_path, {}, {"eos_token_id": [[2]]}), tmp_path / "out")


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path, tokenizer):
    path = write_exported(tmp_path / "source", LLAMA, weights(LLAMA))
    with pytest.raises(ConfigError, match="the tokenizer knows 300 tokens and the model 37"):
        convert_checkpoint(path, tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_the_weights_stay_the_sources(tmp_path, tokenizer):
    path = source(tmp_path, {"eos_token_id": 9})
    convert_checkpoint(path, tmp_path / "out", tokenizer=tokenizer)
    ours, theirs = mmcore.load_model(path).state_dict(), mmcore.load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

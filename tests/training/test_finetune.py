"""Fine-tuning: the checkpoint's weights and tokenizer, a longer context, conversations."""

import dataclasses
import json

import pytest
import torch
import yaml

from mmcore.checkpoint.formats import write_exported
from mmcore.checkpoint.load import load_model, load_tokenizer
from mmcore.data.conversations import CHAT_TEMPLATE
from mmcore.data.tokenizer import CHAT_TOKENS
from mmcore.distributed.mesh import start_world, stop_world
from mmcore.errors import CheckpointError, ConfigError
from mmcore.training import setup
from mmcore.training.finetune import load_finetune_recipe
from mmcore.training.run_folder import RunFolder
from mmcore.training.setup import Start, prepare_trainer
from mmcore.training.tokenizers import find_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_run import tiny_recipe, tiny_values


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    prepare_trainer(tiny_recipe(folder)).fit()
    return folder


def write(base, folder, model=None, **training):
    """A fine-tuning recipe with its own run folder; `model` is its model section, None for none."""
    values = tiny_values(base, init_from=str(base / "run"), **({"steps": 2, "warmup_steps": 0} | training))
    values["checkpoint"]["folder"] = str(folder / "run")
    values.pop("model")
    if model is not None:
        values["model"] = model
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_without_a_model_section_the_model_is_the_checkpoints(base, tmp_path):
    recipe = load_finetune_recipe(write(base, tmp_path))
    assert recipe.model == tiny_recipe(base).model


def test_the_context_may_change_and_the_weights_come_along(base, tmp_path):
    longer = {"max_position_embeddings": 256, "long_term_delay_range": [4, 32], "hidden_size": 32}
    recipe = load_finetune_recipe(write(base, tmp_path, longer, sequence_length=256, batch_size=2, micro_batch_size=1))
    assert (recipe.model.max_position_embeddings, recipe.model.long_term_delay_range) == (256, (4, 32))
    trainer = prepare_trainer(recipe, stage="finetune")
    before = dict(load_model(base / "run").named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert trainer.step == 0 and not trainer.optimizer.state
    outcome = trainer.fit()
    config = json.loads((outcome.checkpoint / "config.json").read_text())
    assert (config["max_position_embeddings"], config["long_term_delay_range"]) == (256, [4, 32])
    assert (outcome.checkpoint / "tokenizer.model").read_bytes() == (base / "run/tokenizer/tokenizer.model").read_bytes()


def test_every_other_key_is_named(base, tmp_path):
    path = write(base, tmp_path, {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 384, "long_term_delay": 8})
    with pytest.raises(ConfigError) as caught:
        load_finetune_recipe(path)
    text = str(caught.value)
    assert "model.hidden_size is 64 here and 32 there" in text and "model.num_hidden_layers is 3" in text
    assert "vocab_size" not in text and "long_term_delay is" not in text


def test_misspelt_keys(base, tmp_path):
    with pytest.raises(ConfigError, match="hiden_size: did you mean hidden_size"):
        load_finetune_recipe(write(base, tmp_path, {"hiden_size": 64}))
    with pytest.raises(ConfigError, match="unknown key training.step: did you mean steps"):
        load_finetune_recipe(write(base, tmp_path, step=3), ["training.init_from=nowhere"])
    with pytest.raises(ConfigError, match="model is 3: it must be a section"):
        load_finetune_recipe(write(base, tmp_path, 3))


def test_a_missing_source(base, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at nowhere"):
        load_finetune_recipe(write(base, tmp_path), ["training.init_from=nowhere"])
    with pytest.raises(ConfigError, match="has no training.init_from"):
        load_finetune_recipe(write(base, tmp_path), ["training.init_from=null"])


def test_a_context_longer_than_the_checkpoints_must_be_said(base, tmp_path):
    recipe = load_finetune_recipe(write(base, tmp_path, sequence_length=128))
    with pytest.raises(ConfigError, match="longer than model.max_position_embeddings 64"):
        prepare_trainer(recipe, stage="finetune")


def test_another_tokenizer_is_refused(base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    prepare_trainer(tiny_recipe(other))  # its made-up words are the same: a smaller vocabulary makes it another
    values = tiny_values(other)
    values["tokenizer"] = {"train_vocab_size": 370}
    values["checkpoint"]["folder"] = str(other / "second")
    from mmcore.config import build_recipe

    prepare_trainer(build_recipe(values))
    recipe = load_finetune_recipe(write(base, tmp_path), [f"tokenizer.path={other / 'second'}"])
    with pytest.raises(ConfigError, match="is not the tokenizer of .*: take tokenizer.path out"):
        prepare_trainer(recipe, stage="finetune")
    same = load_finetune_recipe(write(base, tmp_path), [f"tokenizer.path={base / 'run'}"])
    assert prepare_trainer(same, stage="finetune").step == 0


@pytest.mark.parametrize("named, template, ends, resumed", [
    (2, True, [2, 5], False), ([2, 4, 99], False, [2, 4], False),
    pytest.param([2, 4, 99], True, [2, 4, 5], True, marks=pytest.mark.slow),
])  # fmt: skip
def test_what_ended_a_turn_still_does_after_tuning_on_text(base, tmp_path, named, template, ends, resumed):
    """By the chat template that is kept (5 is <|eot_id|>), or by the list of the source, as of an imported Llama."""
    recipe = load_finetune_recipe(write(base, tmp_path))
    source = tmp_path / "source"
    tokenizer = load_tokenizer(base / "run")
    tokenizer.chat_template = CHAT_TEMPLATE if template else None
    write_exported(source, recipe.model, load_model(base / "run").state_dict(), files=tokenizer.files(),
                   extra={"eos_token_id": named})  # fmt: skip
    recipe = load_finetune_recipe(write(base, tmp_path), [f"training.init_from={source}"])
    trainer = prepare_trainer(recipe, stage="finetune")
    assert trainer.job.config_json["eos_token_id"] == ends
    if resumed:
        trainer.fit()
        trainer = prepare_trainer(recipe, stage="finetune", start=Start(resume=True))
        assert trainer.job.config_json["eos_token_id"] == ends


def test_weights_whose_tokenizer_has_no_chat_tokens_are_not_trained_on_conversations(base, tmp_path):
    """As those of Llama 2, GPT-2 and llama2.c: another tokenizer would be refused as well."""
    values = json.loads(load_tokenizer(base / "run").files()["tokenizer.json"])
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] not in CHAT_TOKENS]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    recipe = load_finetune_recipe(write(base, tmp_path), ["data.kind=conversations"])
    told = (
        r"has no token <\|start_header_id\|>, which conversations need, and its weights .* set data\.kind to text, or begin"
    )
    with pytest.raises(ConfigError, match=told):
        find_tokenizer(recipe, tmp_path, print)


def test_resume_is_exact_here_too(base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    one = prepare_trainer(load_finetune_recipe(write(base, whole, steps=4)), stage="finetune")
    one.fit()
    short = load_finetune_recipe(write(base, parts, steps=2, schedule="constant"))
    prepare_trainer(short, stage="finetune").fit()

    longer = load_finetune_recipe(write(base, parts, steps=4, schedule="constant"), resume=True)
    two = prepare_trainer(longer, stage="finetune", start=Start(resume=True))
    assert two.step == 2
    two.fit()
    three = tmp_path / "three"
    three.mkdir()
    unbroken = prepare_trainer(load_finetune_recipe(write(base, three, steps=4, schedule="constant")), stage="finetune")
    unbroken.fit()
    for (name, p), (_, q) in zip(two.model.named_parameters(), unbroken.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def zero_header(checkpoint):
    with open(next(checkpoint.glob("model*.safetensors")), "r+b") as file:
        file.write(bytes(256))


def cut_json(checkpoint):
    path = checkpoint / "config.json"
    path.write_bytes(b"[" + path.read_bytes()[1:])


def other_window(checkpoint):
    path = checkpoint / "config.json"
    text = path.read_text().replace('"short_term_window": 16', '"short_term_window": 15')
    assert '": 15' in text
    path.write_text(text)


@pytest.mark.parametrize("damage", [zero_header, cut_json, other_window])
def test_a_damaged_newest_checkpoint_is_passed_over(base, tmp_path, damage):
    """Settings and weights are those of the newest whole one, of the run itself and of another run that it starts from."""
    recipe = load_finetune_recipe(write(base, tmp_path, steps=2))
    prepare_trainer(dataclasses.replace(recipe, checkpoint=dataclasses.replace(recipe.checkpoint, every=1)), stage="finetune").fit()
    damage(tmp_path / "run/checkpoints/step-000002")
    again = load_finetune_recipe(write(base, tmp_path, steps=2), ["checkpoint.every=1"], resume=True)
    notices = []
    trainer = prepare_trainer(again, stage="finetune", start=Start(resume=True), listeners=[notices.append])
    assert trainer.step == 1 and again.model == recipe.model
    assert sum("passed over a checkpoint" in getattr(event, "text", "") for event in notices) == 1

    other = load_finetune_recipe(write(base, tmp_path), [f"training.init_from={tmp_path / 'run'}", f"checkpoint.folder={tmp_path / 'b'}"])
    assert other.model == recipe.model
    assert prepare_trainer(other, stage="finetune").step == 0


def opened_source(folder):
    """On a rank: which checkpoint fine-tuning takes from the run in `folder`."""
    recipe = tiny_recipe(folder, init_from=str(folder / "run"))
    world = start_world(torch.device("cpu"))
    try:
        return setup._source(recipe, RunFolder(folder / "tuned"), "finetune", world).path.name
    finally:
        stop_world(world)


@pytest.mark.slow
def test_all_ranks_start_from_the_same_checkpoint_where_the_newest_is_damaged(tmp_path):
    prepare_trainer(tiny_recipe(tmp_path, steps=4)).fit()
    weights = tmp_path / "run/checkpoints/step-000004/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1  # in a tensor, where only a hash finds it
    weights.write_bytes(data)
    assert run_ranks(opened_source, 2, tmp_path) == ["step-000002", "step-000002"]

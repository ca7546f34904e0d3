"""Training goes on from what `mm convert --to train` wrote."""

import json

import pytest
import torch

from mmcore.checkpoint.convert import convert_checkpoint, next_command
from mmcore.checkpoint.formats import open_checkpoint
from mmcore.checkpoint.load import load_model, load_tokenizer
from mmcore.config import build_recipe
from mmcore.errors import CheckpointError, ConfigError
from mmcore.training.setup import Start, prepare_trainer
from tests.helpers.tiny_run import tiny_recipe, tiny_values


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of 8 steps with a checkpoint after 4."""
    folder = tmp_path_factory.mktemp("base")
    values = tiny_values(folder)
    values["checkpoint"] |= {"every": 4, "keep_last": 0}
    prepare_trainer(build_recipe(values)).fit()
    return folder


def recipe_for(base, run, model=None, **training):
    values = tiny_values(base, **training)
    values["checkpoint"]["folder"] = str(run)
    values["model"] |= model or {}
    return build_recipe(values)


def weights(path):
    return dict(load_model(path).named_parameters())


def test_a_converted_step_goes_on_to_the_same_bits(base, tmp_path):
    made = convert_checkpoint(base / "run/checkpoints/step-000004", tmp_path / "run", to="train", max_shard_bytes=20_000)
    assert made.optimizer == "kept"
    assert len(list((tmp_path / "run/checkpoints/step-000004").glob("optimizer-*.safetensors"))) > 1
    outcome = prepare_trainer(recipe_for(base, tmp_path / "run"), start=Start(resume=True)).fit()
    assert outcome.step == 8
    before, after = weights(base / "run"), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("route", [["hf", "torch"]])
def test_weights_without_an_optimizer_begin_at_step_1(base, tmp_path, route):
    source = base / "run"
    for number, to in enumerate(route):
        target = tmp_path / f"{number}{'.pt' if to == 'torch' else ''}"
        convert_checkpoint(source, target, to=to)
        source = target
    convert_checkpoint(source, tmp_path / "run", to="train")
    said = []
    trainer = prepare_trainer(recipe_for(base, tmp_path / "run", steps=2), start=Start(resume=True), listeners=[said.append])
    assert (trainer.step, trainer.position, trainer.tokens) == (0, 0, 0) and not trainer.optimizer.state
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    assert all(torch.equal(start[name], tensor) for name, tensor in weights(base / "run").items())
    assert any("begins with them at step 1" in getattr(event, "text", "") for event in said)
    outcome = trainer.fit()
    state = json.loads((outcome.checkpoint / "trainer.json").read_text())
    assert state["step"] == 2 and state["sample_position"] == 8 and "converted_from" not in state
    assert load_tokenizer(tmp_path / "run").fingerprint == load_tokenizer(base / "run").fingerprint
    assert prepare_trainer(recipe_for(base, tmp_path / "run", steps=3), start=Start(resume=True)).step == 2


def test_the_recipes_model_must_compute_what_the_weights_did(base, tmp_path):
    convert_checkpoint(base / "run", tmp_path / "m.pt", to="torch")
    convert_checkpoint(tmp_path / "m.pt", tmp_path / "run", to="train")
    recipe = recipe_for(base, tmp_path / "run", {"short_term_window": 8, "rms_norm_eps": 1e-6})
    with pytest.raises(CheckpointError) as caught:
        prepare_trainer(recipe, start=Start(resume=True))
    assert "model.short_term_window is 8 in the recipe and 16 there" in str(caught.value)
    assert "model.rms_norm_eps is 1e-06 in the recipe and 1e-05 there" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        prepare_trainer(recipe_for(base, tmp_path / "run", {"model_type": "llama"}), start=Start(resume=True))
    assert "model.model_type is 'llama' in the recipe and 'memory_mosaics_v2' there" in str(caught.value)
    assert "window" not in str(caught.value), "what is equal is no difference"


def test_finetune_begins_from_any_format_with_its_tokenizer(base, tmp_path):
    convert_checkpoint(base / "run", tmp_path / "m.pt", to="torch")
    convert_checkpoint(tmp_path / "m.pt", tmp_path / "folder", to="train")
    for source in ("m.pt", "folder"):
        recipe = recipe_for(base, tmp_path / f"from-{source}", init_from=str(tmp_path / source), steps=1)
        outcome = prepare_trainer(recipe, stage="finetune").fit()
        assert outcome.step == 1
        assert load_tokenizer(outcome.checkpoint).fingerprint == load_tokenizer(base / "run").fingerprint


def test_weights_without_a_tokenizer_need_one_by_name(base, tmp_path):
    model = weights(base / "run")
    torch.save({"model": model, "config": open_checkpoint(base / "run").config_json}, tmp_path / "m.pt")
    recipe = recipe_for(base, tmp_path / "run", init_from=str(tmp_path / "m.pt"), steps=1)
    with pytest.raises(ConfigError, match="m.pt has no tokenizer: name its own with --set tokenizer.path="):
        prepare_trainer(recipe, stage="finetune")
    made = convert_checkpoint(tmp_path / "m.pt", tmp_path / "out")
    assert next_command(made) == f"mm chat {tmp_path / 'out'} --tokenizer FILE"
    values = recipe.as_dict()
    values["tokenizer"]["path"] = str(base / "run/tokenizer")
    assert prepare_trainer(build_recipe(values), stage="finetune").fit().step == 1


def test_an_untouched_recipe_is_still_what_resuming_needs(base, tmp_path):
    """A converted step of a run keeps its recipe, and so the check that nothing was changed."""
    convert_checkpoint(base / "run", tmp_path / "run", to="train")
    with pytest.raises(CheckpointError, match="weight_decay was 0.1 and is now 0.5"):
        prepare_trainer(recipe_for(base, tmp_path / "run", weight_decay=0.5), start=Start(resume=True))
    assert tiny_recipe(base).model == recipe_for(base, tmp_path / "run").model

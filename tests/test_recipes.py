"""Every recipe loads and plans; twins differ in their architecture alone; the paper's values are the paper's."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmcore import planning
from mmcore.config import ModelConfig, TokenizerConfig, load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TWINS = ["quickstart", "stories", "124m", "350m", "1.5b", "8b"]


def recipe(name, *overrides):
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_plans(name):
    loaded = recipe(name)
    training = loaded.training
    gpus = next(f"{n}xH100" for n in (64, 32, 8, 4) if training.batch_size % (n * (training.micro_batch_size or 1)) == 0)
    for machine in (planning.parse_machine(gpus), planning.parse_machine("cpu")):
        plan = planning.plan(loaded, machine)
        assert plan["parameters"]["total"] > 0 and plan["training"]["tokens"] > 0
        if machine.device == "H100":
            assert plan["memory_per_device"]["fits"], "a recipe's micro-batch must fit where it is meant to run"
            assert plan["batch"]["largest_micro_batch"] >= plan["batch"]["micro_batch_size"]
    assert loaded.name == name
    if name != "chat":  # its model is the checkpoint's
        assert loaded.model.max_position_embeddings == loaded.training.sequence_length


def test_the_expected_recipes_exist():
    assert {*TWINS, *(f"{name}-transformer" for name in TWINS), "1.5b-32k", "8b-32k", "chat"} <= set(NAMES)


@pytest.mark.parametrize("name", TWINS)
def test_twins_differ_in_architecture_alone(name):
    mosaic, twin = recipe(name).as_dict(), recipe(f"{name}-transformer").as_dict()
    assert (mosaic["model"].pop("model_type"), twin["model"].pop("model_type")) == ("memory_mosaics_v2", "llama")
    assert mosaic.pop("name") != twin.pop("name")
    assert mosaic == twin
    assert recipe(name).run_folder != recipe(f"{name}-transformer").run_folder


def test_paper_values():
    """Sections 1 and 2 of the paper's set-up."""
    for name, tokens, peak in (("1.5b", 2e11, 3e-4), ("8b", 1e12, 1e-3)):
        training = recipe(name).training
        assert (training.tokens, training.learning_rate) == (tokens, peak)
        assert (training.batch_size, training.sequence_length, training.warmup_steps) == (1024, 4096, 2000)
        assert (training.beta1, training.beta2, training.weight_decay, training.gradient_clip) == (0.9, 0.95, 0.1, 1.0)
        assert (training.schedule, training.final_learning_rate_ratio) == ("cosine", 0.01)
    for name in ("1.5b-32k", "8b-32k"):
        stage = recipe(name)
        assert stage.training.sequence_length == 32_768
        assert stage.training.init_from == f"runs/{name.removesuffix('-32k')}"
        assert stage.training.tokens_per_step == recipe(name.removesuffix("-32k")).training.tokens_per_step


def test_conversations():
    chat = recipe("chat")
    assert chat.data.kind == "conversations" and chat.training.init_from == "runs/quickstart"
    assert chat.model == ModelConfig() and chat.tokenizer == TokenizerConfig(), "both are the checkpoint's"
    assert chat.training.sequence_length <= recipe("quickstart").model.max_position_embeddings


def test_planning_imports_no_torch():
    code = (
        "import sys; from mmcore.config import load_recipe; from mmcli.plan import show_plan; "
        f"show_plan(load_recipe({str(RECIPES / '8b.yaml')!r}), '64xH100', False); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=RECIPES.parent, capture_output=True)

"""`--plan`: the numbers it prints, and what it says of bad input."""

import json
from pathlib import Path

import pytest

from mmcli.plan import show_plan
from mmcore import planning
from mmcore.config import load_recipe
from mmcore.errors import ConfigError
from mmcore.kernels.linear.cpu import multiplies_bf16

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(name, *overrides):
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def planned(capsys, name, gpus, *overrides):
    show_plan(load(name, *overrides), gpus, True)
    return json.loads(capsys.readouterr().out)


def test_json_of_the_paper_run(capsys):
    plan = planned(capsys, "8b", "64xH100")
    assert round(plan["parameters"]["total"] / 1e9, 1) == 9.9
    assert round(plan["parameters"]["without_long_term"] / 1e9, 1) == 8.3
    assert plan["flops_per_token"] == pytest.approx(18.8e9, rel=0.01)
    training = plan["training"]
    assert training["steps"] == 238_419 and training["tokens"] == pytest.approx(1e12, rel=1e-5)
    assert training["days"] * 24 * 64 == pytest.approx(training["gpu_hours"])
    speed = training["mfu"] * 64 * 989e12 / plan["training_flops_per_token"]
    assert training["tokens_per_second"] == pytest.approx(speed)
    assert planned(capsys, "8b-transformer", "64xH100")["parameters"]["total"] == pytest.approx(8.8e9, rel=0.01)


def test_memory_by_part(capsys):
    plan = planned(capsys, "8b", "64xH100")
    memory = plan["memory_per_device"]
    parts = ("weights", "gradients", "optimizer", "working_copies", "activations", "loss")
    assert memory["total"] == sum(memory[part] for part in parts)
    assert memory["weights"] == pytest.approx(4 * plan["parameters"]["total"] / 64)
    assert memory["optimizer"] == pytest.approx(2 * memory["weights"], rel=1e-6)
    assert plan["checkpoint"]["total"] == 12 * plan["parameters"]["total"]
    assert plan["checkpoint"]["copy_bytes_per_device"] == pytest.approx(12 * plan["parameters"]["total"] / 64)


def test_what_saving_takes():
    here = planning.parse_machine("cpu")
    recipe, without = load("quickstart"), load("quickstart", "checkpoint.asynchronous=false")
    copied, plain = (planning.memory_per_device(r, here, 1) for r in (recipe, without))
    assert copied["checkpoint_copy"] == 3 * copied["weights"]
    assert copied["total"] - plain["total"] == pytest.approx(3 * copied["weights"] * (1 + planning.HEAP_SHARE))
    settings = ("training.steps=100", "training.tokens=null", "checkpoint.every=5")
    for keep, expected in (((2, 0), 3), ((0, 0), 20), ((2, 50), 5), ((1, 5), 20)):
        kept = load("quickstart", *settings, f"checkpoint.keep_last={keep[0]}", f"checkpoint.keep_every={keep[1]}")
        assert planning.checkpoints_kept(kept) == expected


def test_largest_micro_batch_is_the_largest(capsys):
    recipe = load("1.5b", "distributed.activation_checkpointing=none")
    machine = planning.parse_machine("8xA100-40GB")
    largest = planning.largest_micro_batch(recipe, machine, 128)
    room = (1 - planning.RESERVE) * machine.memory_bytes
    assert 1 <= largest < 128
    assert planning.memory_per_device(recipe, machine, largest)["total"] <= room
    assert planning.memory_per_device(recipe, machine, largest + 1)["total"] > room


def test_checkpointing_saves_memory():
    machine = planning.parse_machine("64xH100")
    kept = planning.memory_per_device(load("8b", "distributed.activation_checkpointing=none"), machine, 1)
    again = planning.memory_per_device(load("8b"), machine, 1)
    assert again["activations"] < kept["activations"] / 4


def test_selective_checkpointing_lies_between():
    machine = planning.parse_machine("64xH100")
    none, selective, full = (
        planning.memory_per_device(load("8b", f"distributed.activation_checkpointing={mode}"), machine, 1)["activations"]
        for mode in ("none", "selective", "full")
    )
    assert full < selective < 0.8 * none


def test_hybrid_sharding_shares_within_a_node():
    machine = planning.parse_machine("64xH100")
    full = planning.memory_per_device(load("8b"), machine, 16)
    hybrid = planning.memory_per_device(load("8b", "distributed.sharding=hybrid"), machine, 16)
    fewer = planning.memory_per_device(
        load("8b", "distributed.sharding=hybrid", "distributed.shard_size=4"), machine, 16)
    for part in ("weights", "gradients", "optimizer"):
        assert hybrid[part] == pytest.approx(8 * full[part], rel=1e-6)
        assert fewer[part] == pytest.approx(16 * full[part], rel=1e-6)


def test_gradients_are_whole_while_they_wait_for_the_last_micro_batch(capsys):
    machine, parameters = planning.parse_machine("64xH100"), 4 * planning.plan(
        load("8b"), planning.parse_machine("64xH100"))["parameters"]["total"]
    step, each, alone = (
        planning.memory_per_device(load("8b", f"distributed.gradient_reduction={when}"), machine, size)["gradients"]
        for when, size in (("step", 1), ("micro_batch", 1), ("step", 16))
    )
    assert each == pytest.approx(parameters / 64) and step == each + parameters
    assert alone == 0  # a single micro-batch's gradients come as its activations, which are larger, go
    show_plan(load("8b", "distributed.gradient_reduction=step"), "64xH100", False)
    assert "whole until the last micro-batch" in capsys.readouterr().out


def test_offloading_moves_the_states_to_the_host(capsys):
    plan = planned(capsys, "8b", "8xH100", "distributed.cpu_offload=true", "distributed.gradient_reduction=micro_batch")
    memory = plan["memory_per_device"]
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] == 0
    assert plan["host_memory_per_device"] == pytest.approx(16 * plan["parameters"]["total"] / 8)
    show_plan(load("8b", "distributed.cpu_offload=true"), "8xH100", False)
    assert "in host memory" in capsys.readouterr().out


def test_what_does_not_fit_is_said(capsys):
    show_plan(load("8b"), "1xH100", False)
    text = capsys.readouterr().out
    assert "does not fit" in text and "more GPUs" in text
    show_plan(load("124m", "training.micro_batch_size=256"), "1xH100", False)
    assert "--set training.micro_batch_size=" in capsys.readouterr().out


def test_table_shows_the_figures(capsys):
    show_plan(load("8b"), "64xH100", False)
    text = capsys.readouterr().out
    for expected in ("9.93 B", "8.31 B", "18.8 GFLOP", "GPU-hours", "days", "38% MFU", "64 x H100", "It fits."):
        assert expected in text
    show_plan(load("8b-transformer"), "64xH100", False)
    assert "without long-term" not in capsys.readouterr().out


def test_this_machine(capsys):
    """The default is what is here; on a CPU there are no GPU-hours, and the precision is what it multiplies fastest."""
    plan = planned(capsys, "quickstart", None)
    assert plan["machine"]["memory_bytes"] > 2**30
    plan = planned(capsys, "quickstart", "cpu")
    assert plan["machine"]["precision"] == ("bf16" if multiplies_bf16() else "fp32") and plan["training"]["gpu_hours"] is None


def test_ranks_that_share_a_cpu(capsys):
    one, two = (planned(capsys, "quickstart", gpus) for gpus in ("cpu", "2xcpu"))
    assert two["machine"]["count"] == 2 and two["machine"]["memory_bytes"] == one["machine"]["memory_bytes"] // 2
    assert two["memory_per_device"]["weights"] == pytest.approx(one["memory_per_device"]["weights"] / 2)
    assert two["training"]["tokens_per_second"] == pytest.approx(one["training"]["tokens_per_second"])
    show_plan(load("quickstart"), "2xcpu", False)
    assert "Python and torch" in capsys.readouterr().out


@pytest.mark.parametrize("gpus", ["64xH1000", "0xH100", "many", "0xcpu", "-1xH100"])
def test_unknown_machines_are_refused(gpus):
    with pytest.raises(ConfigError, match="write it as 64xH100, with one of A100"):
        planning.parse_machine(gpus)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="batch_size 1024 does not divide over 7 devices"):
        planning.plan(load("8b"), planning.parse_machine("7xH100"))


@pytest.mark.parametrize("name, mib, known", [
    ("NVIDIA H100 80GB HBM3", 81559, "H100"), ("NVIDIA A100-SXM4-40GB", 40960, "A100-40GB"),
    ("NVIDIA A100-SXM4-80GB", 81920, "A100"), ("NVIDIA L40S", 46068, "L40S"), ("Tesla T4", 15360, None),
    ("NVIDIA B200", 183359, "B200"), ("NVIDIA L4", 23034, "L4"), ("NVIDIA H200", 143771, "H200"),
])
def test_names_that_drivers_give(name, mib, known):
    assert planning._table_name(name, mib) == known


@pytest.mark.parametrize("name, gpus, overrides, words", [
    ("8b", "1024xH100", (), "1024 does not divide into micro-batches of 2 on 1024 ranks"),
    ("350m", "64xH100", (), "256 does not divide into micro-batches of 8 on 64 ranks"),
    ("8b", "64xH100", ("training.sequence_length=8192",), "longer than model.max_position_embeddings 4096"),
    ("8b", "64xH100", ("distributed.sharding=hybrid", "distributed.shard_size=7"), "shard_size 7 does not divide 64 ranks"),
    ("8b", "12xH100", ("distributed.sharding=hybrid", "training.batch_size=1008"), "shard_size 8 does not divide 12 ranks"),
    ("8b", "1xH100", ("distributed.cpu_offload=true",), "this is one process"),
    ("8b", "64xH100", ("data.sources=[]",), "data.sources is empty"),
])
def test_what_training_refuses_is_not_planned(name, gpus, overrides, words):
    with pytest.raises(ConfigError, match=words):
        planning.plan(load(name, *overrides), planning.parse_machine(gpus))


def test_a_micro_batch_that_is_recommended_can_be_trained_with(capsys):
    recipe, machine = load("1.5b", "training.micro_batch_size=8"), planning.parse_machine("8xH100")
    assert planning.largest_micro_batch(recipe, machine, 128) == 6
    assert planning.plan(recipe, machine)["batch"]["largest_micro_batch"] == 4
    show_plan(recipe, "8xH100", False)
    assert "--set training.micro_batch_size=4 does." in capsys.readouterr().out
    plan = planning.plan(load("1.5b", "training.micro_batch_size=4"), machine)
    assert plan["memory_per_device"]["fits"]

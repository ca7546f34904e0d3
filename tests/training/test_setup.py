"""Every mistake that can be known before the first step: one sentence, and nothing written."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmcore.config import build_recipe
from mmcore.errors import CheckpointError, ConfigError, DataError, HardwareError, MMError
from mmcore.model.accounting import checkpoint_bytes
from mmcore.training import checks
from mmcore.training.events import Notice
from mmcore.training.restoring import check_goes_on
from mmcore.training.setup import Start, _changes, prepare_trainer
from mmcore.training.step import IGNORED
from tests.helpers.tiny_run import tiny_values

ROOT = Path(__file__).resolve().parents[2]


def changed(folder, **keys):
    """The tiny recipe with `section__key=value` set."""
    values = tiny_values(folder)
    for name, value in keys.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return build_recipe(values)


def refusal(folder, kind, **keys):
    recipe = changed(folder, **keys)
    with pytest.raises(kind) as caught:
        prepare_trainer(recipe)
    assert not recipe.run_folder.exists(), "a refused run must leave nothing"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_without_length_or_data(tmp_path):
    assert "neither training.steps nor training.tokens" in refusal(tmp_path, ConfigError, training__steps=None)
    assert "data.sources is empty" in refusal(tmp_path, ConfigError, data__sources=[])


@pytest.mark.parametrize("key, value, words", [
    ("learning_rate", float("nan"), "it must be a number"), ("learning_rate", float("inf"), "must be positive"),
    ("beta1", 2, r"must lie in \[0, 1\)"), ("beta2", -0.1, r"must lie in \[0, 1\)"), ("adam_eps", -1, "must not be negative"),
    ("weight_decay", -1, "must not be negative"), ("final_learning_rate_ratio", -3, "must not be negative"),
    ("tokens", float("inf"), "must be a number"), ("validation_tokens", float("inf"), "must be a number"),
    ("validation_every", -3, "must not be negative"), ("validation_tokens", 0, "must be at least 1"),
    ("gradient_clip", float("nan"), "it must be a number"), ("warmup_steps", -1, "must not be negative"),
])  # fmt: skip
def test_settings_out_of_range(tmp_path, key, value, words):
    with pytest.raises(ConfigError, match=f"training.{key} is .*{words}"):
        checks.check_recipe(changed(tmp_path, **{f"training__{key}": value, "training__steps": None if key == "tokens" else 8}))


def test_other_sections_out_of_range(tmp_path):
    with pytest.raises(ConfigError, match="data.workers is -1: it must not be negative"):
        checks.check_recipe(changed(tmp_path, data__workers=-1))
    with pytest.raises(ConfigError, match="tokenizer.train_megabytes is -1.0: it must be positive"):
        checks.check_recipe(changed(tmp_path, tokenizer__train_megabytes=-1))


def test_recipes_that_had_a_meaning_are_still_read(tmp_path):
    """Those that runs of earlier versions lie with: they may be evaluated, and resumed with other values."""
    keys = {"data__workers": 0, "training__validation_tokens": 0, "training__validation_every": -1,
            "tokenizer__train_megabytes": 0, "training__final_learning_rate_ratio": 1.5}  # fmt: skip
    assert changed(tmp_path, **keys).training.validation_tokens == 0
    checks.check_recipe(changed(tmp_path, data__workers=0, training__final_learning_rate_ratio=1.5,
                                tokenizer__path="t", tokenizer__train_megabytes=0))  # fmt: skip


def test_the_users_folder_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = changed(tmp_path, checkpoint__folder="~/run", tokenizer__path="~/tokens", training__init_from="~/base")
    found = recipe.run_folder, recipe.tokenizer.path, recipe.training.init_from
    assert [str(path) for path in found] == [str(tmp_path / "home" / name) for name in ("run", "tokens", "base")]


def test_a_warm_up_longer_than_the_run_is_said(tmp_path):
    heard = []
    prepare_trainer(changed(tmp_path, training__warmup_steps=80), listeners=[heard.append])
    (text,) = [event.text for event in heard if isinstance(event, Notice)]
    assert text.startswith("the warm-up of 80 steps is longer than the run of 8: the learning rate comes to 10.0% of its peak")


def test_fewer_steps_than_are_done_change_nothing(tmp_path):
    recipe = changed(tmp_path)
    prepare_trainer(recipe).fit()
    before = (recipe.run_folder / "recipe.yaml").read_text()
    with pytest.raises(CheckpointError, match="step-000008 is at step 8 and the recipe ends at step 5: raise training.steps"):
        prepare_trainer(changed(tmp_path, training__steps=5), start=Start(resume=True))
    assert (recipe.run_folder / "recipe.yaml").read_text() == before


def test_a_precision_that_auto_chooses_anew_is_said_on_a_resume(tmp_path, monkeypatch):
    def resumed(multiplies, **keys):
        heard = []
        monkeypatch.setattr(checks, "multiplies_bf16", lambda: multiplies)
        prepare_trainer(changed(tmp_path, **keys), start=Start(resume=True), listeners=[heard.append]).fit()
        said = [event.text for event in heard if isinstance(event, Notice)]
        return [text for text in said if text.startswith("training.precision") and "slower" not in text]

    assert resumed(False, training__precision="auto", training__steps=1) == []
    assert resumed(True, training__precision="auto", training__steps=2) == [
        "training.precision is auto, which was fp32 and is bf16 here: sums round differently"]
    newest = tmp_path / "run/checkpoints/step-000002"
    assert json.loads((newest / "trainer.json").read_text())["precision"] == "bf16"
    same, other = (changed(tmp_path, training__precision=name) for name in ("auto", "fp32"))
    assert [text for text in _changes(same, "bf16", newest) if "precision" in text] == []
    assert [text for text in _changes(other, "fp32", newest) if "precision" in text] == [
        "training.precision was 'auto' and is now 'fp32'"]


def write_conversations(path, lengths):
    """Rows of a question of so many words and a short answer."""
    rows = [{"messages": [{"role": "user", "content": "word " * n}, {"role": "assistant", "content": f"yes {n}"}]} for n in lengths]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path)}]


def test_conversations_whose_answers_lie_past_the_window(tmp_path):
    """Held out, there is no validation, and training goes on; to learn from, they are refused."""
    short, long = (write_conversations(tmp_path / name, range(a, a + 40)) for name, a in (("short.jsonl", 1), ("long.jsonl", 300)))
    heard = []
    common = {"data__kind": "conversations", "checkpoint__every": 2, "data__validation_fraction": 0.0, "model__vocab_size": 280}
    recipe = changed(tmp_path, data__sources=short, data__validation=long, **common)
    assert prepare_trainer(recipe, listeners=[heard.append]).fit().status == "done"
    assert (recipe.run_folder / "checkpoints" / "step-000008").is_dir()
    said = [event.text for event in heard if isinstance(event, Notice)]
    assert any("no validation loss" in text and "within its first 64 tokens" in text for text in said)
    assert not any("held-out conversations are longer" in text for text in said)
    recipe = changed(tmp_path, data__sources=long, checkpoint__folder=str(tmp_path / "other"), **common)
    with pytest.raises(DataError, match="nothing to learn: raise training.sequence_length"):
        prepare_trainer(recipe)
    both = {"data__sources": short + long, "data__validation": write_conversations(tmp_path / "two.jsonl", [3, 500])}
    recipe = changed(tmp_path, checkpoint__folder=str(tmp_path / "both"), **both, **common)
    heard.clear()
    trainer = prepare_trainer(recipe, listeners=[heard.append])
    said = [event.text for event in heard if isinstance(event, Notice)]
    assert any(re.match(r"\d+ conversations are longer than 64 .* left out, and \d+ of them altogether", text) for text in said)
    assert any(text.startswith("1 held-out conversations are longer than 64 tokens") for text in said)
    assert all(trainer.job.samples[n].trained.any() for n in range(len(trainer.job.samples)))
    assert trainer.job.data_identity != json.loads((recipe.run_folder / "data.json").read_text())["identity"]


def test_data_split_by_an_earlier_version_are_refused_with_the_reason():
    saved = SimpleNamespace(state={"data_identity": "before"})
    with pytest.raises(DataError, match="or an earlier version of mm wrote it and split them otherwise.*or that version"):
        check_goes_on(saved, Path("step-000002"), "now", 8)


def test_a_context_longer_than_the_model_is_made_for(tmp_path):
    text = refusal(tmp_path, ConfigError, training__sequence_length=128)
    assert "training.sequence_length 128 is longer than model.max_position_embeddings 64" in text


def test_a_micro_batch_larger_than_the_batch(tmp_path):
    assert "micro_batch_size 9 is larger" in refusal(tmp_path, ConfigError, training__micro_batch_size=9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_asked_for_where_there_is_none(tmp_path):
    text = refusal(tmp_path, HardwareError, training__device="cuda")
    assert text.startswith("training.device is cuda, but") and "training.device=cpu" in text


def test_an_unknown_device(tmp_path):
    assert "choose auto, cpu or cuda" in refusal(tmp_path, ConfigError, training__device="tpu")


def test_a_batch_that_does_not_divide_over_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = refusal(tmp_path, ConfigError)
    assert "training.batch_size 4 does not divide into micro-batches of 2 on 4 ranks: make it a multiple of 8" in text


def test_missing_data(tmp_path):
    assert "nowhere.txt" in refusal(tmp_path, DataError, data__sources=[{"path": str(tmp_path / "nowhere.txt")}])


def test_text_that_is_not_utf8(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes("naïve ".encode("latin-1") * 1000)
    assert "bad.txt" in refusal(tmp_path, DataError, data__sources=[{"path": str(bad)}])


def test_a_tokenizer_that_knows_more_than_the_model(tmp_path):
    text = refusal(tmp_path, ConfigError, tokenizer__train_vocab_size=400)
    assert "the tokenizer knows 400 tokens and model.vocab_size is 384: set model.vocab_size to 400 or more" in text


def test_a_vocabulary_larger_than_the_tokenizers_is_padding(tmp_path):
    trainer = prepare_trainer(changed(tmp_path, tokenizer__train_vocab_size=380, training__steps=1))
    assert trainer.fit().status == "done"


def test_too_little_memory(tmp_path, monkeypatch):
    class Little:
        available, total = 2**20, 2**20

    monkeypatch.setattr(checks.psutil, "virtual_memory", lambda: Little)
    text = refusal(tmp_path, HardwareError)
    assert "0.0 GiB are free on cpu" in text and "micro_batch_size (now 2)" in text and "--plan" in text


def test_too_little_disk(tmp_path, monkeypatch):
    class Little:
        free = 1000

    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Little)
    text = refusal(tmp_path, HardwareError)
    assert "keep_last (now 2)" in text and re.search(r"need about 1\.\d MiB and 0\.0 MiB are free", text)


@pytest.fixture
def disk(tmp_path):
    """A disk with room for three checkpoints of the tiny model, and what else a run writes, but not for four."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", tmp_path / "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user mounts no disks")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


@pytest.mark.slow
def test_a_run_that_there_was_room_for_goes_on_and_starts_over_on_its_own_disk(tmp_path, disk):
    def train(steps, **start):
        keys = {"checkpoint__folder": str(disk / "run"), "training__steps": steps, "training__validation_every": 0}
        trainer = prepare_trainer(changed(tmp_path, **keys), start=Start(**start))
        assert trainer.fit().status == "done"
        return sorted(path.name for path in (disk / "run/checkpoints").iterdir())

    size = checkpoint_bytes(changed(tmp_path).model)["total"]
    assert 3 * size < shutil.disk_usage(disk).free < 4 * size
    assert train(4) == ["step-000002", "step-000004"]
    assert shutil.disk_usage(disk).free < 2 * size
    # the checkpoint resumed from, which otherwise stays, would be the one too many
    assert train(8, resume=True) == ["step-000006", "step-000008"]
    assert train(2, overwrite=True) == ["step-000002"]
    with pytest.raises(HardwareError, match="MiB beside those that are there and .* MiB are free at .*disk/run/checkpoints"):
        prepare_trainer(changed(tmp_path, checkpoint__folder=str(disk / "run"), checkpoint__keep_last=5), start=Start(resume=True))


def test_what_the_run_has_there_takes_no_more_room(tmp_path, disk):
    recipe = changed(tmp_path, checkpoint__folder=str(disk / "run"))
    checks.check_disk(recipe)
    for step in (2, 4):
        (disk / f"run/checkpoints/step-{step:06d}").mkdir(parents=True)
        (disk / f"run/checkpoints/step-{step:06d}/model.safetensors").write_bytes(bytes(checkpoint_bytes(recipe.model)["total"]))
    checks.check_disk(recipe)
    assert not checks.may_keep_one_more(recipe)
    (disk / "other").write_bytes(bytes(500_000))
    with pytest.raises(HardwareError, match="MiB beside those that are there and"):
        checks.check_disk(recipe)


def test_a_run_that_goes_on_has_room_for_the_checkpoint_that_it_writes_before_any_goes(tmp_path, disk):
    """Also where more lie there than are to be kept."""
    recipe = changed(tmp_path, checkpoint__folder=str(disk / "run"), checkpoint__keep_last=1)
    size = checkpoint_bytes(recipe.model)["total"]
    for step in (2, 4, 6):
        (disk / f"run/checkpoints/step-{step:06d}").mkdir(parents=True)
        (disk / f"run/checkpoints/step-{step:06d}/model.safetensors").write_bytes(bytes(size))
    assert 0 < shutil.disk_usage(disk).free < size
    checks.check_disk(recipe, overwriting=True)
    with pytest.raises(HardwareError, match="MiB beside those that are there and"):
        checks.check_disk(recipe)


def test_the_disk_that_counts_is_the_one_that_a_link_leads_to(tmp_path, disk):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(disk)
    checks.check_disk(changed(tmp_path))
    with pytest.raises(HardwareError, match="are free at .*run/checkpoints"):
        checks.check_disk(changed(tmp_path, checkpoint__keep_last=9, checkpoint__every=1))


def test_pretraining_leaves_the_chat_template_out_and_conversations_bring_it(tmp_path):
    trainer = prepare_trainer(changed(tmp_path))
    assert "chat_template.jinja" not in trainer.job.files
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]}
        for n in range(400)
    ]
    talk = tmp_path / "talk.jsonl"
    talk.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = changed(
        tmp_path, data__kind="conversations", data__sources=[{"path": str(talk)}], checkpoint__folder=str(tmp_path / "talk"),
        tokenizer__path=str(tmp_path / "run"),
    )  # fmt: skip
    trainer = prepare_trainer(recipe)
    assert "<|eot_id|>" in trainer.job.files["chat_template.jinja"].decode()
    assert len(trainer.job.config_json["eos_token_id"]) == 2
    labels = torch.cat([batch.labels.flatten() for batch in trainer.job.validation])
    kept = float((labels != IGNORED).float().mean())
    assert 0.05 < kept < 0.6, "the loss is on the assistant's words alone"


def test_bits_per_byte_count_the_bytes_behind_the_labels(tmp_path):
    trainer = prepare_trainer(changed(tmp_path))
    from mmcore.data.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    labels = [label for batch in trainer.job.validation for label in batch.labels[batch.labels != IGNORED].tolist()]
    text = sum(len(piece) for piece in (tokenizer.token_bytes()[label] for label in labels))
    assert trainer.job.bytes_per_token == pytest.approx(text / len(labels))


def test_no_validation_where_nothing_is_held_out(tmp_path):
    heard = []
    trainer = prepare_trainer(changed(tmp_path, data__validation_fraction=0, training__steps=1), listeners=[heard.append])
    outcome = trainer.fit()
    assert outcome.status == "done"
    assert any("no validation loss" in getattr(event, "text", "") for event in heard)


def test_every_recipe_of_the_project_passes_the_checks_of_its_own_values():
    from mmcore.config import load_recipe

    paths = sorted((ROOT / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        checks.check_recipe(load_recipe(path))


def test_fine_tuning_needs_a_source_that_is_not_its_own_folder(tmp_path):
    prepare_trainer(changed(tmp_path, training__steps=1)).fit()
    with pytest.raises(ConfigError, match="no training.init_from"):
        prepare_trainer(changed(tmp_path), stage="finetune", start=Start(overwrite=True))
    own = changed(tmp_path, training__init_from=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="lies in the run's own folder"):
        prepare_trainer(own, stage="finetune", start=Start(overwrite=True))
    assert (tmp_path / "run" / "checkpoints" / "step-000001").exists()
    gone = changed(tmp_path, training__init_from=str(tmp_path / "gone"), checkpoint__folder=str(tmp_path / "two"))
    with pytest.raises(CheckpointError, match="no checkpoint at .*gone"):
        prepare_trainer(gone, stage="finetune")
    assert issubclass(CheckpointError, MMError)

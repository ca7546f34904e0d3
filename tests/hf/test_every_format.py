"""Every format that conversion reads, with every option of it and of the command, in transformers after `--to hf`.

All folders are loaded in one process with the network refused; its logits and greedy texts are held to those that
mmcore computes from the source.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import mmcore
from mmcli.app import run
from mmcore.checkpoint.formats import open_checkpoint, write_exported
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.config import ModelConfig
from tests.checkpoint.llama_reference import write_llama2c
from tests.checkpoint.small import LLAMA, moments, save, weights
from tests.checkpoint.test_formats import LLAMA3
from tests.helpers.models import tiny
from tests.helpers.ranked import write_ranked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed: pip install 'mm[hf]'"),
]
TOKENS = [[1, *(i * 29 % 31 for i in range(2, 80))]]
NEW = 12
WIDE = vars(LLAMA) | {"vocab_size": 61, "hidden_size": 32}
OPTIONS = {
    "grouped": {},
    "one key-value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "rope_theta": 500_000.0},
    "head_dim": {"head_dim": 20, "rms_norm_eps": 1e-6},
}  # fmt: skip


def lively(config: ModelConfig, seed: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights whose logits depend on the context, so that another computation would write another text."""
    return {name: 5 * tensor for name, tensor in weights(config, seed, dtype).items()}


def sources(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """name -> (source, options of the command)."""
    mosaic = tiny()
    model, values = mosaic.state_dict(), config_json(mosaic.config, torch.float32)
    exported = write_exported(folder / "exported", mosaic.config, model)
    texts = {"config.json": json.dumps(values).encode(), "trainer.json": b'{"step": 4}'}
    ranked = write_ranked(folder / "ranked/checkpoints/step-000004", 4, {"model": model, "optimizer": moments(model)}, 3, texts)
    torch.save({"model": model, "config": values}, folder / "ours.pt")
    write_llama2c(folder / "llama2c.bin", 24, 20, 2, 4, 2, 61, 128, True)
    write_llama2c(folder / "untied.bin", 24, 20, 2, 4, 4, 61, 128, False)
    found = {
        "training": (save(folder / "run", 5, config=mosaic.config, model=model, optimizer=moments(model)), []),
        "training, three ranks": (ranked, ["--max-shard-size", "20KB"]),
        "exported": (exported, ["--dtype", "float32"]),
        "exported, bfloat16": (exported, ["--dtype", "bfloat16", "--max-shard-size", "20KB"]),
        "exported, float16": (exported, ["--dtype", "float16"]),
        "state dict": (folder / "ours.pt", []),
        "llama2.c": (folder / "llama2c.bin", []),
        "llama2.c, untied": (folder / "untied.bin", ["--max-shard-size", "3KB"]),
    }
    for name, changes in OPTIONS.items():
        config = ModelConfig(**(WIDE | changes))
        path = write_exported(folder / name, config, lively(config), max_shard_bytes=9000)
        found[f"llama, {name}"] = (path, ["--max-shard-size", "9KB"])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(sources, what transformers made of their conversions)."""
    folder = tmp_path_factory.mktemp("formats")
    given, folders = sources(folder), {}
    for number, (name, (source, options)) in enumerate(given.items()):
        folders[name] = str(folder / "converted" / str(number))
        assert run(["convert", str(source), folders[name], *options]) == 0, name
    (folder / "jobs.json").write_text(json.dumps({"tokens": TOKENS, "new_tokens": NEW, "folders": folders}))
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).with_name("formats_driver.py")), str(folder / "jobs.json"),
         str(folder / "results.pt")],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return given, {name: Path(path) for name, path in folders.items()}, torch.load(folder / "results.pt", weights_only=True)


def test_transformers_computes_what_the_source_does(found):
    given, folders, results = found
    assert set(results) == set(given)
    for name, (source, options) in given.items():
        kind, dtype, logits, ids = results[name]
        said = options[options.index("--dtype") + 1] if "--dtype" in options else "float32"
        assert dtype == f"torch.{said}", name
        assert kind == ("LlamaForCausalLM" if "llama" in name else "MemoryMosaicForCausalLM"), name
        with torch.no_grad():
            expected = mmcore.load_model(source, dtype=torch.float32)(torch.tensor(TOKENS))
        if said == "float32":
            near = 1e-5 if "llama" in name else 3e-5  # sharp memories amplify fp32's rounding
            assert (logits - expected).abs().max() <= near * max(1.0, float(expected.abs().max())), name
            text = list(mmcore.generate(mmcore.load_model(source), TOKENS[0], max_new_tokens=NEW, stop_ids=()))
            assert ids == [text] and len(set(text)) > 1, name
        else:  # what rounding costs is the certificate's to judge; here: it is this model and no other
            assert (logits - expected).abs().mean() < 0.15 * expected.abs().mean(), name
        assert len(list(folders[name].glob("*.safetensors"))) > (2 if "--max-shard-size" in options else 0), name


def test_each_conversion_has_a_certificate(found):
    _, folders, _ = found
    for name, folder in folders.items():
        certificate = json.loads((folder / "certificate.json").read_text())
        assert certificate["largest_difference"] <= certificate["tolerance"], name
        assert certificate["rounded"] == ("float16" in name), name
        assert open_checkpoint(folder).format == ("hf-llama" if "llama" in name else "exported")

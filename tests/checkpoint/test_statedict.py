"""State dicts as users hold them: our names, Hugging Face's, Meta's; config inside or beside; one file or shards."""

import json
import os

import pytest
import torch

from mmcore.checkpoint.formats import open_checkpoint
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.names import hugging_face_to_meta, meta_name
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError
from tests.checkpoint.small import ALL, LLAMA, MOSAIC, TIED, same, weights


def values(config):
    return json.loads(json.dumps(config_json(config, torch.float32, 1, 2)))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("inside", ["", "model", "state_dict", "module"])
def test_where_the_tensors_stand(tmp_path, inside, prefix):
    state = {prefix + name: tensor for name, tensor in weights(MOSAIC).items()}
    torch.save({inside: state, "epoch": 3} if inside else state, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text(json.dumps(values(MOSAIC)))
    for path in (tmp_path / "m.pt", tmp_path):
        read = open_checkpoint(path)
        assert read.config == MOSAIC and read.format == "torch" and same(weights(MOSAIC), read.tensors)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_the_config_may_be_inside(tmp_path, config):
    torch.save({"model": weights(config), "config": values(config)}, tmp_path / "m.pth")
    read = open_checkpoint(tmp_path / "m.pth")
    assert read.config == config and same(weights(config), read.tensors)


def test_parameters_views_and_shared_storage(tmp_path):
    """What state dicts hold beside plain tensors: parameters, transposed views, slices of one storage."""
    state = weights(TIED)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.norm.weight"] = torch.nn.Parameter(state["model.norm.weight"])
    for name, tensor in state.items():
        if name.endswith("down_proj.weight"):
            state[name] = tensor.t().contiguous().t()
    torch.save({"model": state, "config": values(TIED)}, tmp_path / "m.pt")
    assert same(weights(TIED), open_checkpoint(tmp_path / "m.pt").tensors)


def test_shards_of_an_old_hugging_face_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values(LLAMA)))
    names = list(weights(LLAMA))
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: weights(LLAMA)[name] for name in names if files[name] == file}, tmp_path / file)
    with pytest.raises(CheckpointError, match="holds 2 PyTorch files"):
        open_checkpoint(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    read = open_checkpoint(tmp_path)
    assert same(weights(LLAMA), read.tensors) and len(read.weight_files) == 2
    index.write_text(json.dumps({"weight_map": files | {"x": "../outside.bin"}}))
    with pytest.raises(CheckpointError, match="a shard must be a plain file name"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": files}))
    torch.save(dict(weights(LLAMA)), tmp_path / files[names[0]])
    with pytest.raises(CheckpointError, match="is in pytorch_model-00001-of-00002.bin and again in"):
        open_checkpoint(tmp_path)


GQA = ModelConfig(**{**vars(LLAMA), "rope_theta": 500_000.0, "max_position_embeddings": 8192})
LLAMA31 = ModelConfig(**{**vars(GQA), "max_position_embeddings": 131_072, "rope_scaling": {
    "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
    "original_max_position_embeddings": 8192}})  # fmt: skip


@pytest.mark.parametrize("config", [GQA, LLAMA31, TIED], ids=["llama3", "llama3.1", "tied"])
@pytest.mark.parametrize("beside", ["params.json", "config.json"])
def test_metas_names(tmp_path, config, beside):
    """The rows of q and k come back in Hugging Face's order; the logits are tested with llama2.c's files, which
    have the same layout."""
    state = {meta_name(name): hugging_face_to_meta(name, tensor, config) for name, tensor in weights(config).items()}
    assert not torch.equal(state["layers.0.attention.wq.weight"], weights(config)["model.layers.0.self_attn.q_proj.weight"])
    torch.save(state | {"rope.freqs": torch.ones(2)}, tmp_path / "consolidated.00.pth")
    params = {"dim": 16, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
              "n_kv_heads": config.kv_heads, "norm_eps": 1e-5, "rope_theta": config.rope_theta, "vocab_size": -1,
              "multiple_of": 256, "use_scaled_rope": config.rope_scaling is not None}  # fmt: skip
    (tmp_path / beside).write_text(json.dumps(params if beside == "params.json" else values(config)))
    for path in (tmp_path, tmp_path / "consolidated.00.pth"):
        read = open_checkpoint(path)
        assert same(weights(config), read.tensors)
        assert ModelConfig(**{**vars(read.config), "num_key_value_heads": config.num_key_value_heads}) == config


def test_faults_are_all_listed(tmp_path):
    state = weights(MOSAIC)
    del state["model.norm.weight"]
    state["lm_head.weight"] = torch.zeros(3, 3)
    state["extra\x1b[31m.weight"] = torch.zeros(1)
    state["model.layers.0.memory_norm.weight"] = torch.zeros(16, dtype=torch.int64)
    state["model.layers.0.short_term.value_mix"] = torch.zeros(2).to_sparse()
    state["module.model.layers.1.memory_norm.weight"] = torch.zeros(16)
    state["step"] = 3
    torch.save({"model": state, "config": values(MOSAIC)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m.pt")
    text = str(caught.value)
    for words in ("model.norm.weight", "lm_head.weight is [3, 3] and must be [37, 16]", "is int64, which is no dtype",
                  "step is a int and no plain tensor", "is there twice", "short_term.value_mix is a Tensor and no plain"):  # fmt: skip
        assert words in text, text
    assert "\x1b" not in text


def test_tied_weights_that_differ(tmp_path):
    torch.save({"model": weights(TIED) | {"lm_head.weight": torch.zeros(37, 16)}, "config": values(TIED)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="ties lm_head.weight to model.embed_tokens.weight, but the two differ"):
        dict(open_checkpoint(tmp_path / "m.pt").tensors)


def test_what_is_no_state_dict(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(weights(MOSAIC), path)
    with pytest.raises(CheckpointError, match="has no configuration: put the model's config.json into"):
        open_checkpoint(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match="holds no dict of tensors"):
        open_checkpoint(path)
    torch.save({"model": {}, "config": values(MOSAIC)}, path)
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_checkpoint(path)
    os.symlink(path, tmp_path / "link.pt")
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(tmp_path / "link.pt")


def test_a_huge_claim_takes_no_memory(tmp_path):
    """An expanded tensor has any shape over one number."""
    torch.save({"model": {"lm_head.weight": torch.ones(1).expand(10**12)}, "config": values(MOSAIC)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="larger than its file"):
        open_checkpoint(tmp_path / "m.pt")

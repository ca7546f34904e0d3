import math
import re

import pytest
import torch

from mmcore.checkpoint import names
from mmcore.config import ModelConfig
from mmcore.errors import CheckpointError
from tests.checkpoint.small import ALL, LLAMA, MOSAIC, TIED, weights


def count(config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in names.expected_tensors(config).values())


@pytest.mark.parametrize(
    "layers, d, heads, wide, billions", [(24, 2048, 16, 6144, 2.0), (32, 4096, 32, 14336, 9.9)]
)  # fmt: skip
def test_the_papers_sizes_come_out(layers, d, heads, wide, billions):
    config = ModelConfig(hidden_size=d, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads)
    assert round(count(config) / 1e9, 1) == billions
    without = sum(math.prod(s) for n, s in names.expected_tensors(config).items() if ".long_term." not in n)
    if layers == 32:  # W_o's columns for the long-term heads go as well
        assert round((without - layers * d * d) / 1e9, 1) == 8.3


def test_the_baseline_has_the_papers_size():
    config = ModelConfig(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32)  # fmt: skip
    assert round(count(config) / 1e9, 1) == 8.8


def test_mosaic_names_are_the_contract():
    """The table of the contract, written out for one layer."""
    H, d, wide, V = 2, 16, 24, 37
    layer = {"memory_norm.weight": (d,), "out_proj.weight": (d, 2 * d), "persistent_norm.weight": (d,),
             "persistent.gate_proj.weight": (wide, d), "persistent.up_proj.weight": (wide, d),
             "persistent.down_proj.weight": (d, wide)}  # fmt: skip
    for S in ("short_term", "long_term"):
        layer |= {f"{S}.key_proj.weight": (d, d), f"{S}.value_proj.weight": (d, d), f"{S}.gate_proj.weight": (H, d),
                  f"{S}.decay_proj.weight": (H, d), f"{S}.value_mix": (H,), f"{S}.value_log_scale": (H,),
                  f"{S}.bandwidth_base": (H,), f"{S}.bandwidth_slope": (H,),
                  f"{S}.bandwidth_exponent": (H,)}  # fmt: skip
    whole = {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,), "lm_head.weight": (V, d)}
    for depth in range(MOSAIC.num_hidden_layers):
        whole |= {f"model.layers.{depth}.{name}": shape for name, shape in layer.items()}
    assert names.expected_tensors(MOSAIC) == whole


@pytest.mark.parametrize("config", [LLAMA, TIED], ids=["grouped", "tied"])
def test_baseline_names_are_hugging_faces(config):
    transformers = pytest.importorskip("transformers")
    from mmcore.checkpoint.formats.modelconfig import config_json

    values = config_json(config, torch.float32)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    shapes = {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}
    assert names.expected_tensors(config) == shapes


def test_meta_names_translate_both_ways():
    for name in names.expected_tensors(LLAMA):
        theirs = names.meta_name(name)
        assert names.hugging_face_name(theirs) == name
    assert names.meta_name("model.layers.11.mlp.down_proj.weight") == "layers.11.feed_forward.w2.weight"
    with pytest.raises(KeyError):
        names.meta_name("model.layers.0.mlp.bias")


def test_rotary_permutation_is_inverted():
    for name, tensor in weights(LLAMA).items():
        theirs = names.hugging_face_to_meta(name, tensor, LLAMA)
        assert torch.equal(names.meta_to_hugging_face(name, theirs, LLAMA), tensor)
        assert torch.equal(theirs, tensor) == (not re.search("[qk]_proj", name))


def test_rotary_permutation_row_by_row():
    """Row 2i of a head (Meta's pair i, first) becomes row i; row 2i+1 becomes row i + D/2."""
    D = LLAMA.head_size
    for part, heads in (("q", LLAMA.num_attention_heads), ("k", LLAMA.kv_heads)):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        meta = torch.arange(heads * D)[:, None].expand(-1, 16)
        ours = names.meta_to_hugging_face(name, meta, LLAMA)
        for head in range(heads):
            for i in range(D // 2):
                assert ours[head * D + i, 0] == head * D + 2 * i
                assert ours[head * D + i + D // 2, 0] == head * D + 2 * i + 1


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_right_tensors_pass(config):
    shapes = names.expected_tensors(config)
    assert names.check_tensors(config, shapes, "here") == list(shapes)


def test_every_fault_is_in_one_message():
    shapes = names.expected_tensors(MOSAIC)
    del shapes["model.norm.weight"], shapes["model.layers.1.out_proj.weight"]
    shapes["model.layers.0.long_term.value_mix"] = (3,)
    shapes["evil\x1b[31m"] = (1,)
    with pytest.raises(CheckpointError) as caught:
        names.check_tensors(MOSAIC, shapes, "folder", ["lm_head.weight is in two files"])
    message = str(caught.value)
    for part in ("2 missing (model.layers.1.out_proj.weight, model.norm.weight)", "1 misshapen", "value_mix is [3]",
                 "must be [2]", "1 unexpected", "lm_head.weight is in two files", "folder"):  # fmt: skip
        assert part in message
    assert message.isprintable()


def test_a_long_list_is_counted():
    with pytest.raises(CheckpointError, match="and 25 more"):
        names.check_tensors(MOSAIC, {f"x{i}": (1,) for i in range(45)}, "folder")


def test_layers_beyond_the_files_are_refused_before_they_are_listed():
    config = ModelConfig(num_hidden_layers=2**31 - 1)
    with pytest.raises(CheckpointError, match="2147483647 layers and the files hold 1"):
        names.check_tensors(config, {"a": (1,)}, "folder")


def test_a_tied_classifier_has_no_tensor():
    shapes = names.expected_tensors(TIED)
    assert "lm_head.weight" not in shapes
    with pytest.raises(CheckpointError, match=r"1 unexpected \(lm_head.weight\)"):
        names.check_tensors(TIED, shapes | {"lm_head.weight": (37, 16)}, "folder")


def test_old_rotary_tables_are_left_out():
    shapes = names.expected_tensors(LLAMA)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    assert names.check_tensors(LLAMA, shapes | table, "folder") == list(shapes)

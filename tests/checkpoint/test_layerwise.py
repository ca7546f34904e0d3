"""Block after block is the whole model."""

import pytest
import torch

from mmcore.checkpoint.certificate import probe_tokens
from mmcore.checkpoint.formats import open_checkpoint, write_exported
from mmcore.checkpoint.layerwise import Layerwise, Whole
from mmcore.checkpoint.load import model_from
from tests.checkpoint.small import ALL, MOSAIC, weights


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_logits_of_the_blocks_are_those_of_the_model(tmp_path, config, monkeypatch):
    from mmcore.checkpoint import layerwise

    monkeypatch.setattr(layerwise, "_PIECE", 4 * 16 * 10)  # ten rows of the classifier at once
    checkpoint = open_checkpoint(write_exported(tmp_path / "out", config, weights(config), dtype=torch.bfloat16))
    tokens = probe_tokens(config)
    steps = Layerwise(config, checkpoint.tensors)
    x = steps.embed(tokens)
    for number in range(steps.blocks):
        x = steps.block(number, x)
    pieces = list(steps.logits(x))
    assert [start for start, _ in pieces] == [0, 10, 20, 30]
    logits = torch.cat([piece for _, piece in pieces], dim=1)
    with torch.no_grad():
        whole = model_from(checkpoint, dtype=torch.float32)(tokens)[0]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))
    ((start, same),) = Whole(checkpoint).logits(tokens)
    assert start == 0 and torch.equal(same, whole)


def test_only_one_block_is_in_memory(tmp_path):
    steps = Layerwise(MOSAIC, weights())
    x = steps.embed(probe_tokens(MOSAIC))
    for number in range(steps.blocks):
        x = steps.block(number, x)
        assert all(parameter.is_meta for parameter in steps._model.parameters())
    assert not x.is_meta


def test_the_probe_reaches_the_long_term_memories():
    """Without them the logits differ, so a conversion that broke them would show."""
    tokens = probe_tokens(MOSAIC)
    assert tokens.shape == (1, 128) and int(tokens.max()) < 37
    config, tensors = MOSAIC, weights(MOSAIC)
    changed = dict(tensors)
    changed["model.layers.1.long_term.value_proj.weight"] = -tensors["model.layers.1.long_term.value_proj.weight"]

    def logits(tensors):
        steps = Layerwise(config, tensors)
        x = steps.embed(tokens)
        for number in range(steps.blocks):
            x = steps.block(number, x)
        return torch.cat([piece for _, piece in steps.logits(x)], dim=1)

    assert (logits(tensors) - logits(changed)).abs().max() > 1e-3

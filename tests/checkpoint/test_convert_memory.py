"""Conversion streams: the memory it needs does not grow with the model."""

import pytest
import torch

from mmcore.config import ModelConfig
from tests.benchmarks.bench_convert import measure

WIDE = dict(vocab_size=4096, hidden_size=512, intermediate_size=1536, num_attention_heads=8)
LAYERS = 32


@pytest.mark.slow
def test_memory_is_that_of_a_few_tensors(tmp_path, monkeypatch):
    """A model of 264 MB in bf16, whose two sides would be 1,056 MB in fp32, is converted and compared in a few hundred
    beside what the imports take: twice 64 MB of mapped files, two blocks, the buffers of the product and the hash."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    figures = measure(tmp_path, ModelConfig(num_hidden_layers=LAYERS, **WIDE), torch.bfloat16, ["hf-hf", "hf-torch"])
    model = figures["hf source, MB"]
    assert model > 250
    for way in ("hf-hf", "hf-torch"):
        needed = figures[f"{way}: peak MB"] - figures["imports alone, peak MB"]
        assert needed < 0.9 * model, figures

"""A tokenizer of bytes and small models for the tests of evaluation."""

import torch

from mmcore.config import ModelConfig
from mmcore.model import build_model

BEGIN, END = 256, 257


class ByteTokenizer:
    """Each UTF-8 byte is a token: figures can be worked out by hand."""

    fingerprint = "bytes"
    vocab_size = 258

    def frame(self):
        return BEGIN, END

    def encode(self, text):
        return list(text.encode("utf-8"))

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def small_model(model_type="memory_mosaics_v2", context=32, seed=0, dtype=torch.float32):
    """A model of bytes with weights large enough that its predictions depend on what it has read."""
    config = ModelConfig(
        model_type=model_type, vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, short_term_window=9, long_term_delay=4, long_term_delay_range=(4, 9),
        max_position_embeddings=context,
    )
    model = build_model(config)
    model.init_weights(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.to(dtype).eval()


class EchoModel(torch.nn.Module):
    """Its "loss" of a label tells which token was read, which was to be predicted, and how many of its document had
    been read in the same row: 65,536 seen + 256 token + label, exact in fp32 for bytes."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def loss(self, tokens, labels, documents=None, delay=None, reduction="sum"):
        assert reduction == "none"
        self.calls.append((tokens.shape, documents, labels))
        if documents is None:
            documents = torch.ones_like(tokens)
        seen = torch.zeros_like(tokens)
        for row in range(tokens.shape[0]):
            for t in range(tokens.shape[1]):
                same = t > 0 and documents[row, t] == documents[row, t - 1]
                seen[row, t] = seen[row, t - 1] + 1 if same else 1
        return torch.where(labels == -100, 0, 65_536 * seen + 256 * tokens + labels).float()

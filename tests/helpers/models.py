"""Small models for tests."""

import torch

from mmcore.config import ModelConfig
from mmcore.model import build_model


def tiny(model_type: str = "memory_mosaics_v2", kernels: str = "auto", seed: int = 0, lively: bool = True, **changes):
    """A small initialized model in eval mode. `lively` moves every weight away from its start, so that gates, decays
    and bandwidths of a trained model are met."""
    settings = dict(model_type=model_type, vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, short_term_window=9, long_term_delay=5, long_term_delay_range=(5, 9),
                    max_position_embeddings=64)
    model = build_model(ModelConfig(**(settings | changes)), kernels)
    model.init_weights(seed)
    if lively:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.3 * torch.randn(weight.shape, generator=generator) * (1 if weight.ndim == 1 else 0.5)
    return model.eval()


def random_tokens(*shape: int, seed: int = 0, vocabulary: int = 61) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))

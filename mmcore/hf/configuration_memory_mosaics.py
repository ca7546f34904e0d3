"""Configuration of a Memory Mosaic v2 (Zhang and Bottou, "Memory Mosaics at scale", arXiv 2507.03285).

This file needs transformers alone, so that a folder which ships it can be used without any other package.
"""

from typing import ClassVar

from transformers import PreTrainedConfig


class MemoryMosaicConfig(PreTrainedConfig):
    """config.json of a Memory Mosaic.

    hidden_size is d, intermediate_size d' of the persistent memories, num_attention_heads H of each contextual memory.
    A short-term query at t reads the pairs t - short_term_window + 1 .. t - 1, a long-term one 1 .. t - long_term_delay;
    long_term_delay_range tells the delays that training drew from. There is no position encoding, so
    max_position_embeddings only says how long a context the model was trained for.
    """

    model_type = "memory_mosaics_v2"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    AUTO_MAP: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_memory_mosaics.MemoryMosaicConfig",
        "AutoModel": "modeling_memory_mosaics.MemoryMosaicModel",
        "AutoModelForCausalLM": "modeling_memory_mosaics.MemoryMosaicForCausalLM",
    }

    def __init__(
        self,
        vocab_size=128_256,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        short_term_window=256,
        long_term_delay=64,
        long_term_delay_range=(64, 256),
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        use_cache=True,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} does not divide into {num_attention_heads} heads")
        if not kwargs.get("gated_keys", True):
            raise ValueError("gated_keys is false, and these classes only know keys with gates: read the model with mmcore")
        if short_term_window < 1 or long_term_delay < 1:
            raise ValueError("short_term_window and long_term_delay must be at least 1")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.short_term_window = short_term_window
        self.long_term_delay = long_term_delay
        self.long_term_delay_range = list(long_term_delay_range)
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **{"auto_map": dict(self.AUTO_MAP)} | kwargs,
        )


__all__ = ["MemoryMosaicConfig"]

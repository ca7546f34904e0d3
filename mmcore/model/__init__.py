"""The models: one device, no torch.distributed; code that reads like the paper."""

from __future__ import annotations

from mmcore.config import ModelConfig
from mmcore.model.language_model import LanguageModel
from mmcore.model.mosaic import build_mosaic
from mmcore.model.transformer import build_transformer


def build_model(config: ModelConfig, kernels: str = "auto") -> LanguageModel:
    """The model that `config.model_type` names, with unset weights on torch's default device (meta works).

    `kernels` is the implementation given to every kernel: auto, or one by name.
    """
    build = build_mosaic if config.model_type == "memory_mosaics_v2" else build_transformer
    return build(config, kernels)

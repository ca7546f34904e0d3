"""The models: one device, no torch.distributed; code that reads like the paper.

Nothing here imports torch before a model is built: `mm pretrain --plan` only counts (accounting.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmcore.config import ModelConfig

if TYPE_CHECKING:
    from mmcore.model.language_model import LanguageModel


def build_model(config: ModelConfig, kernels: str = "auto") -> LanguageModel:
    """The model that `config.model_type` names, with unset weights on torch's default device (meta works).

    `kernels` is the implementation given to every kernel: auto, or one by name. Raises ConfigError for a name that is none.
    """
    from mmcore.errors import ConfigError
    from mmcore.kernels.dispatch import NAMES
    from mmcore.model.mosaic import build_mosaic
    from mmcore.model.transformer import build_transformer
    from mmcore.model.v1 import build_v1

    if kernels not in NAMES:
        raise ConfigError(f"kernels is {kernels!r}: choose one of {', '.join(NAMES)}")
    builders = {"memory_mosaics_v2": build_mosaic, "memory_mosaics_v1": build_v1}
    return builders.get(config.model_type, build_transformer)(config, kernels)


def __getattr__(name: str) -> Any:
    if name != "LanguageModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mmcore.model.language_model import LanguageModel

    return LanguageModel

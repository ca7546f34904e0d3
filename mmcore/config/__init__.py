"""A recipe as typed, frozen settings.

Defaults < the recipe's `extends` parents < the recipe < `--set section.key=value`. Unknown keys and values of
the wrong type are errors that name the key, the value and the remedy; all of them are reported at once. What
a section means is written under each of its fields. No torch here: `mm --help` and `--plan` stay light.
"""

from mmcore.config.files import build_recipe, load_recipe, read_recipe
from mmcore.config.model import ARCHITECTURES, ModelConfig, V1Config, model_config_from_json
from mmcore.config.sections import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    Recipe,
    SourceConfig,
    SpikeConfig,
    TokenizerConfig,
    TrainingConfig,
)

__all__ = [
    "ARCHITECTURES", "CheckpointConfig", "DataConfig", "DistributedConfig", "ModelConfig", "Recipe", "SourceConfig",
    "SpikeConfig", "TokenizerConfig", "TrainingConfig", "V1Config", "build_recipe", "load_recipe",
    "model_config_from_json", "read_recipe",
]  # fmt: skip

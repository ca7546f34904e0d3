"""Memory Mosaics in transformers.

`import mmcore.hf` makes AutoConfig, AutoModel and AutoModelForCausalLM know model_type memory_mosaics_v2:

    import mmcore.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("exported/")
    tokenizer = AutoTokenizer.from_pretrained("exported/")

The two modules beside this one are also what an exported folder ships, byte for byte, for use without this package
(mmcore/checkpoint/hub.py). They are written to be read, and to need nothing but transformers; `mmcore.load_model` is
the faster way. What `save_pretrained` writes ships them too.
"""

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError("mmcore.hf needs transformers: pip install 'mm[hf]'", name="transformers") from None

from mmcore.hf.configuration_memory_mosaics import MemoryMosaicConfig
from mmcore.hf.modeling_memory_mosaics import MemoryMosaicCache, MemoryMosaicForCausalLM, MemoryMosaicModel

__all__ = ["MemoryMosaicCache", "MemoryMosaicConfig", "MemoryMosaicForCausalLM", "MemoryMosaicModel"]

transformers.AutoConfig.register(MemoryMosaicConfig.model_type, MemoryMosaicConfig)
transformers.AutoModel.register(MemoryMosaicConfig, MemoryMosaicModel)
transformers.AutoModelForCausalLM.register(MemoryMosaicConfig, MemoryMosaicForCausalLM)
MemoryMosaicConfig.register_for_auto_class()
MemoryMosaicModel.register_for_auto_class("AutoModel")
MemoryMosaicForCausalLM.register_for_auto_class("AutoModelForCausalLM")

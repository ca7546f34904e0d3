"""Formats that checkpoints come in, and the one way to open them."""

from __future__ import annotations

from pathlib import Path

from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.formats.folder import open_folder, write_exported
from mmcore.checkpoint.formats.llama2c import open_llama2c
from mmcore.checkpoint.formats.v1 import open_v1
from mmcore.checkpoint.resolve import resolve_checkpoint

FORMATS = {
    "training": ("a step of a run: weights, optimizer, position in the data", "read"),
    "exported": ("config.json and safetensors of a Memory Mosaic", "read, write (--to hf)"),
    "hf-llama": ("Hugging Face's LlamaForCausalLM in safetensors", "read, write (--to hf)"),
    "llama2c": ("llama2.c's .bin, version 0, with its tokenizer beside it", "read"),
    "v1": ("the public v1 code's ckpt.pt (nanoMosaics, Library), GPT-2's tokenizer beside it", "read"),
}
"""Name -> what it is, and what can be done with it."""


def open_checkpoint(path: str | Path, *, verify: bool = True, allow_nonfinite: bool = False) -> Checkpoint:
    """Open whatever `path` means (see resolve_checkpoint), without reading weights yet.

    verify=False leaves out the hashes of a training checkpoint, for one that was verified a moment ago.
    allow_nonfinite=True hands out weights with NaN or infinity, to look at what went wrong. Raises
    CheckpointError where the checkpoint is missing, damaged, or does not fit its configuration.
    """
    found = resolve_checkpoint(path, verify=verify)
    if found.is_file() and found.suffix == ".pt":
        return open_v1(found, verify=verify, allow_nonfinite=allow_nonfinite)
    if found.is_file():
        return open_llama2c(found, allow_nonfinite=allow_nonfinite)
    return open_folder(found, verify=False, allow_nonfinite=allow_nonfinite)


__all__ = ["FORMATS", "Checkpoint", "open_checkpoint", "write_exported"]

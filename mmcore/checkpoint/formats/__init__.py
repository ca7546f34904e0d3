"""Formats that checkpoints come in, and the one way to open them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmcore.checkpoint.formats.base import Checkpoint
from mmcore.checkpoint.formats.folder import open_folder, write_exported
from mmcore.checkpoint.formats.llama2c import open_llama2c
from mmcore.checkpoint.formats.statedict import open_state_dict
from mmcore.checkpoint.formats.torchfile import is_torch_file
from mmcore.checkpoint.formats.v1 import is_v1, open_v1
from mmcore.checkpoint.integrity import ALONE, Hashes
from mmcore.checkpoint.resolve import resolve_checkpoint
from mmcore.distributed.messages import Messages
from mmcore.errors import CheckpointError


@dataclass(frozen=True)
class Format:
    """A row of `mm convert --list`."""

    what: str
    can: str
    """read, write and how."""
    carries: str
    lost: str
    """What a conversion into it leaves behind, or what it never had."""


FORMATS = {
    "training": Format(
        "a step of a run, saved by any number of ranks",
        "read, write (--to train)",
        "weights, optimizer, position in the data, recipe, tokenizer, chat template",
        "nothing from another step; other sources have no optimizer and no position: training begins at step 1",
    ),
    "exported": Format(
        "config.json and safetensors of a Memory Mosaic or a long-short transformer",
        "read, write (--to hf)",
        "weights, tokenizer, chat template, where generation ends; a Memory Mosaic v2 also its classes for transformers",
        "optimizer, position in the data, recipe",
    ),
    "hf-llama": Format(
        "Hugging Face's LlamaForCausalLM in safetensors, also as a snapshot in the hub's cache: tied or not, grouped "
        "key-value heads, head_dim, rotary scaling linear or llama3",
        "read, write (--to hf)",
        "weights, tokenizer, chat template, where generation ends",
        "optimizer, position in the data, recipe; refused: biases, quantized weights, other rotary scalings",
    ),
    "torch": Format(
        "a state dict in a .pt, .pth or .bin of PyTorch: names of this project, of Hugging Face's Llama, or Meta's; "
        "config inside, or config.json or params.json beside it",
        "read, write (--to torch)",
        "weights, config, tokenizer and chat template (as bytes inside)",
        "optimizer, position in the data, recipe; refused: anything that is not a tensor or a plain value",
    ),
    "llama2c": Format(
        "llama2.c's .bin, version 0, with its tokenizer beside it",
        "read",
        "weights in float32, tokenizer",
        "not written: it has no place for a mosaic",
    ),
    "v1": Format(
        "a ckpt.pt of the public v1 code (facebookresearch/MemoryMosaics): nanoMosaics, Library and its eft form",
        "read",
        "weights, settings, GPT-2's tokenizer beside it",
        "not written; optimizer and iteration are left out",
    ),
}
"""Name -> what it is, what can be done with it, and what comes along."""


def open_checkpoint(path: str | Path, *, verify: Hashes = True, allow_nonfinite: bool = False,
                    messages: Messages = ALONE) -> Checkpoint:  # fmt: skip
    """Open whatever `path` means (see resolve_checkpoint), without reading weights yet.

    verify=False leaves out the hashes of a training checkpoint, for one that was verified a moment ago, and a set of names
    all but theirs; where a run's newest one then turns out damaged, the newest whole one is taken, as with the hashes.
    allow_nonfinite=True hands out weights with NaN or infinity, to look at what went wrong. messages: of ranks that
    open it together, which share the reading for the hashes. Raises CheckpointError where the checkpoint is
    missing, damaged, or does not fit its configuration.
    """
    found = resolve_checkpoint(path, verify=verify, messages=messages)
    if found.is_dir():
        try:
            return open_folder(found, verify=False, allow_nonfinite=allow_nonfinite)
        except CheckpointError:
            if verify is True or found == Path(path):
                raise
        return open_checkpoint(path, allow_nonfinite=allow_nonfinite)  # the other ranks may have opened it
    if found.suffix == ".bin" and not is_torch_file(found):
        return open_llama2c(found, allow_nonfinite=allow_nonfinite)
    if is_v1(found):
        return open_v1(found, verify=verify is True, allow_nonfinite=allow_nonfinite)
    return open_state_dict(found, allow_nonfinite=allow_nonfinite)


__all__ = ["FORMATS", "Checkpoint", "Format", "open_checkpoint", "write_exported"]

"""From a path to a model that is ready to read, or to its tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmcore.checkpoint import ends
from mmcore.checkpoint.formats import Checkpoint, open_checkpoint
from mmcore.errors import CheckpointError, ConfigError, HardwareError

if TYPE_CHECKING:
    from mmcore.data.tokenizer import Tokenizer
    from mmcore.model.language_model import LanguageModel


_FORMATS = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
            "float16": torch.float16, "fp16": torch.float16, "int8": torch.int8}  # fmt: skip


def weight_format(name: str) -> torch.dtype:
    """What `load_model` takes as dtype, by the name that a user types. Raises ConfigError."""
    if name not in _FORMATS:
        raise ConfigError(f"--dtype is {name!r}: choose float32, bfloat16, float16 or int8")
    return _FORMATS[name]


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    without: Iterable[str] = (),
    kernels: str = "auto",
) -> LanguageModel:
    """A model in eval mode from any readable checkpoint: a run folder, a training checkpoint, an exported or
    Hugging Face Llama folder, a PyTorch state dict, a llama2.c file.

    dtype: of the weights; None keeps the file's; torch.int8 keeps the matrices in int8 with a scale for each row, for
    inference (LanguageModel.quantize), and the rest as in the file. without: memories that read as empty, such as
    ("long_term",). kernels: the implementation of every kernel. Peak memory is the model plus one tensor, and for int8
    the model in the file's dtype. Raises CheckpointError for a checkpoint that is damaged or does not fit,
    HardwareError for a device that is not there, ConfigError for a memory or a kernel that the model does not have, or a
    dtype that no weights have.
    """
    return model_from(open_checkpoint(path), dtype=dtype, device=device, without=without, kernels=kernels)


def model_from(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    without: Iterable[str] = (),
    kernels: str = "auto",
) -> LanguageModel:
    """load_model for a checkpoint that is open already."""
    from mmcore.kernels.allocator import move_to_huge_pages
    from mmcore.model import build_model  # here, so that opening a checkpoint does not load the kernels

    if dtype is not None and dtype not in (*_FORMATS.values(), torch.float64):
        raise ConfigError(
            f"dtype is {dtype!r}: give a torch.dtype of floats of 16 bits or more, such as torch.bfloat16, or torch.int8"
        )
    where = _device(device)
    with torch.device("meta"):
        model = build_model(checkpoint.config, kernels)
    _fill(model, checkpoint, checkpoint.dtype if dtype in (None, torch.int8) else dtype, where)
    if dtype is torch.int8:
        model.quantize()
    move_to_huge_pages(model)
    model.without((without,) if isinstance(without, str) else tuple(without))
    model.stop_ids = frozenset(ends.stop_ids(checkpoint))
    return model.eval()


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        first = str(error).splitlines()[0]
        raise HardwareError(f"the device {name} cannot be used ({first}): choose cpu") from error
    return device


@torch.no_grad()
def _fill(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every parameter of a model on the meta device by the checkpoint's tensor.

    A tensor is put in place rather than copied into an empty one: to_empty would tear tied weights apart.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    left = set(checkpoint.tensors)
    for names in aliases.values():
        source = next((name for name in names if name in left), None)
        if source is None:
            raise CheckpointError(f"{checkpoint.path} has no {names[0]}: this version of mm cannot read it")
        left.discard(source)
        value = checkpoint.tensors[source]
        if value.shape != model.get_parameter(names[0]).shape:
            raise CheckpointError(f"{checkpoint.path}: {source} does not fit: this version of mm cannot read it")
        # copy=True: the tensor is mapped from the file, which may be replaced while the model lives
        parameter = nn.Parameter(value.to(device=device, dtype=dtype, copy=True))
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)
    unset = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if left or unset:
        raise CheckpointError(
            f"{checkpoint.path} does not fill the model ({', '.join(sorted(left) + unset)}): this version of mm cannot "
            f"read it"
        )


def load_tokenizer(path: str | Path, tokenizer: str | Path | None = None) -> Tokenizer:
    """The tokenizer of any readable checkpoint, or the one given: a tokenizer's file or a folder with one.

    Raises CheckpointError where there is none, and DataError where it cannot be read.
    """
    from mmcore.data.tokenizer_files import load_tokenizer as load

    if tokenizer is not None:
        return load(tokenizer)
    # the weights' hashes say nothing about the tokenizer: sizes are enough here
    checkpoint = open_checkpoint(path, verify=False)
    if checkpoint.files:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in checkpoint.files.items():
                (Path(folder) / name).write_bytes(content)
            tokenizer = load(folder)
        tokenizer.origin = f"the tokenizer of {checkpoint.path}"
        return tokenizer
    if checkpoint.tokenizer_path is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer: put its tokenizer.json or tokenizer.model there, or give one "
            f"with --tokenizer"
        )
    return load(checkpoint.tokenizer_path)

"""What can be known before any work is done: the recipe against itself, the device, memory and disk."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import psutil
import torch

from mmcore import planning
from mmcore.config import Recipe
from mmcore.config.checks import check_run
from mmcore.distributed.float8 import check_float8
from mmcore.distributed.mesh import World
from mmcore.errors import ConfigError, HardwareError
from mmcore.kernels.linear.cpu import multiplies_bf16
from mmcore.model.accounting import checkpoint_bytes
from mmcore.training.run_folder import RunFolder

_GIB = 2**30


def check_recipe(recipe: Recipe, world: World | None = None, begins: bool = True) -> None:
    """Raise ConfigError where sections of a recipe contradict one another, or the number of ranks; see check_run."""
    world = world or World()
    check_run(recipe, world.size, world.local_size, begins)


def choose_device(requested: str, world: World | None = None) -> torch.device:
    """The device of `training.device`: auto takes a GPU where there is one, each rank of a node its own.

    Raises ConfigError, HardwareError.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"training.device is {requested!r}: choose auto, cpu or cuda")
    if requested == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device answers"
        raise HardwareError(f"training.device is cuda, but {why}: set training.device=cpu, or use a machine with a GPU")
    if requested == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world is not None and world.size > 1:
        if world.local_size > torch.cuda.device_count():
            raise HardwareError(
                f"{world.local_size} ranks run on this machine and it has {torch.cuda.device_count()} GPUs: start at most "
                f"as many ranks, or set training.device=cpu"
            )
        torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(requested: str, device: torch.device) -> str:
    """fp32, bf16 or fp8. Raises HardwareError for a device that cannot compute it."""
    if requested == "auto":
        can = torch.cuda.is_bf16_supported() if device.type == "cuda" else multiplies_bf16()
        return "bf16" if can else "fp32"
    if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise HardwareError("training.precision is bf16, which this GPU cannot compute: set training.precision=fp32")
    if requested == "fp8":
        check_float8(device)
    return requested


def check_memory(recipe: Recipe, device: torch.device, world: World | None = None) -> None:
    """Raise HardwareError where the plan's estimate for a rank does not fit into the memory that is free for it now."""
    world = world or World()
    machine = planning.machine_here() if device.type == "cuda" else planning.parse_machine("cpu")
    machine = dataclasses.replace(machine, count=world.size, per_node=world.local_size)
    share = recipe.training.batch_size // world.size
    micro_batch = min(recipe.training.micro_batch_size or share, share)
    needed = planning.memory_per_device(recipe, machine, micro_batch)["total"]
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // world.local_size
    if needed <= free:
        return
    remedies = []
    if micro_batch > 1:
        remedies.append(f"lower training.micro_batch_size (now {micro_batch})")
    if recipe.distributed.activation_checkpointing != "full":
        remedies.append("set distributed.activation_checkpointing=full")
    if device.type == "cpu" and recipe.checkpoint.asynchronous:
        remedies.append("set checkpoint.asynchronous=false")
    remedies.append("train on more ranks" if world.size > 1 else "make the model smaller")
    raise HardwareError(
        f"training needs about {needed / _GIB:.1f} GiB and {free / _GIB:.1f} GiB are free on {device.type}: "
        f"{', or '.join(remedies)}; `mm pretrain RECIPE --plan` shows where the memory goes"
    )


def check_disk(recipe: Recipe, overwriting: bool = False) -> None:
    """Raise HardwareError where the checkpoints that are kept at once do not fit on the disk that they lie on.

    What the run has there already takes no more room, whether it goes on from it or overwrites it; but one that goes on
    writes a checkpoint before it removes any.
    """
    there = sum(_bytes_of(folder) for folder in _checkpoints(recipe).glob("step-*"))
    one = checkpoint_bytes(recipe.model)["total"]
    needed = planning.checkpoints_kept(recipe) * one - there
    if there and not overwriting:
        needed = max(needed, one)
    place = _existing(_checkpoints(recipe))
    free = shutil.disk_usage(place).free
    if needed > free:
        raise HardwareError(
            f"the checkpoints need about {_size(needed)}{' beside those that are there' if there else ''} and {_size(free)} "
            f"are free at {place}: free some space, lower checkpoint.keep_last (now {recipe.checkpoint.keep_last}), or "
            f"choose another checkpoint.folder"
        )


def may_keep_one_more(recipe: Recipe) -> bool:
    """Whether, beside the checkpoint that is about to be written, the disk has room for one that the plan of check_disk
    does not know of."""
    free = shutil.disk_usage(_existing(_checkpoints(recipe))).free
    return free >= 2 * checkpoint_bytes(recipe.model)["total"]


def _checkpoints(recipe: Recipe) -> Path:
    return RunFolder(recipe.run_folder).checkpoints


def _bytes_of(folder: Path) -> int:
    """Of the files in a checkpoint; a link to another place has none here."""
    if folder.is_symlink() or not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file() and not file.is_symlink())


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= 0.05 * _GIB else f"{count / 2**20:.1f} MiB"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path

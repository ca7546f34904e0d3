"""What a recipe will cost on given machines, from formulas alone: nothing is allocated and torch is not imported.

Memory assumes what the trainer does: fp32 master weights, gradients and AdamW moments, cut over all GPUs or over those
of a node (distributed.sharding), bf16 products on GPUs, fp32 on CPUs. Speed assumes a utilization (MFU) that is stated
with its reason.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from mmcore import processors
from mmcore.config import Recipe
from mmcore.config.checks import check_run
from mmcore.errors import ConfigError
from mmcore.model import accounting

GIB = 2**30

_GPUS = {
    # name: (dense bf16 FLOP/s, without sparsity; plain fp32 FLOP/s; usable GiB), from the makers' data sheets
    "A100": (312e12, 19.5e12, 79.0),
    "A100-40GB": (312e12, 19.5e12, 39.0),
    "H100": (989e12, 67e12, 79.0),
    "H200": (989e12, 67e12, 140.0),
    "B200": (2250e12, 75e12, 178.0),
    "L40S": (362e12, 91.6e12, 44.0),
    "L4": (121e12, 30.3e12, 22.0),
}

_GPU_MFU = 0.38
_GPU_MFU_REASON = (
    "assumed: torchtitan publishes 33 % (eager) to 39 % (compiled) for Llama 3.1 8B in bf16 on 8 H100s"
)
_CPU_MFU = 0.50
_CPU_MFU_REASON = "assumed: Hugging Face's Llama reaches 48 to 74 % of the fp32 matrix-product peak on 2 AVX2 cores"
_MATRIX_MFU = 0.12
_MATRIX_MFU_REASON = "measured: a mosaic of 40 M parameters in bf16 on 2 cores with AMX, which wait for memory"

RESERVE = 0.08
"""Share of a device's memory that the plan leaves free: a GPU's allocator, CUDA context and NCCL buffers; on a CPU other
programs."""

PROGRAM_BYTES = 430_000_000
"""Resident in a process on a CPU before any tensor: Python, torch with the compiler that its optimizer imports."""

HEAP_SHARE = 0.16
"""What the C library's heap wastes beside the tensors of a process on a CPU, as a share of them: freed activations leave
holes that do not fit the next ones. bench_plan.py compares plan and process."""


@dataclass(frozen=True)
class Machine:
    """`count` equal devices."""

    device: str
    """cpu, or the GPU's name."""
    count: int
    peaks: dict[str, float]
    """Dense FLOP/s of one device by precision; one that is missing is not known."""
    memory_bytes: int
    """Of one device."""
    mfu: float
    """Assumed share of the peak."""
    mfu_reason: str
    per_node: int = 8
    """Devices of one node, joined by a fast network: what hybrid sharding cuts the weights over."""

    @property
    def is_cpu(self) -> bool:
        return self.device == "cpu"


def parse_machine(text: str) -> Machine:
    """A machine from "64xH100", "H100", "cpu", or "2xcpu": this CPU shared by two ranks. Raises ConfigError, naming the
    known GPUs."""
    match = re.fullmatch(r"\s*(?:(\d+)\s*[xX*×]\s*)?([A-Za-z0-9-]+)\s*", text)
    names = {name.lower(): name for name in (*_GPUS, "cpu")}
    if not match or match[2].lower() not in names or match[1] and int(match[1]) < 1:
        raise ConfigError(f"--gpus {text}: write it as 64xH100, with one of {', '.join(_GPUS)}, or cpu or 2xcpu (two ranks)")
    name, count = names[match[2].lower()], int(match[1] or 1)
    if name == "cpu":
        return _cpu(count)
    memory = int(_GPUS[name][2] * GIB)
    return Machine(name, count, _gpu_peaks(name), memory, _GPU_MFU, _GPU_MFU_REASON)


def machine_here() -> Machine:
    """The GPUs of this machine as nvidia-smi lists them, else its CPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return _cpu()
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    lines = [line.rsplit(",", 1) for line in answer.stdout.splitlines() if "," in line]
    if answer.returncode or not lines:  # a driver without a card, or none that answers
        return _cpu()
    name, mib = lines[0][0].strip(), float(lines[0][1])
    known = _table_name(name, mib)
    return Machine(known or name, len(lines), _gpu_peaks(known), int(mib * 2**20), _GPU_MFU, _GPU_MFU_REASON)


def _table_name(device_name: str, mib: float) -> str | None:
    """The table's name for "NVIDIA H100 80GB HBM3" and the like."""
    words = re.split(r"[\s-]+", device_name.upper())
    if "A100" in words and (0 < mib < 50_000 or "40GB" in words):
        return "A100-40GB"
    return next((name for name in _GPUS if name in words), None)


def _gpu_peaks(name: str | None) -> dict[str, float]:
    return {"bf16": _GPUS[name][0], "fp32": _GPUS[name][1]} if name else {}


def _cpu(ranks: int = 1) -> Machine:
    memory = psutil.virtual_memory().total // ranks
    peaks = {precision: peak / ranks for precision, peak in _cpu_peaks().items()}
    return Machine("cpu", ranks, peaks, memory, _CPU_MFU, _CPU_MFU_REASON, per_node=ranks)


def _cpu_peaks() -> dict[str, float]:
    """Cores x clock x fp32 FLOPs a cycle: two fused multiply-add units of 4, 8 (AVX2) or 16 (AVX-512) lanes; in bf16 twice
    as many where there are instructions for it, and 1,024 where there is a matrix unit (AMX).

    The clock is the nominal one; where cores boost, matrix products run up to 15 % above this.
    """
    frequency = psutil.cpu_freq()
    cores = min(psutil.cpu_count(logical=False) or psutil.cpu_count() or 0, processors.allowed())
    if frequency is None or not cores or not (frequency.max or frequency.current):
        return {}
    flags = _cpu_flags()
    lanes = 16 if "avx512f" in flags else 8 if "avx2" in flags else 4
    peak = cores * (frequency.max or frequency.current) * 1e6 * 2 * 2 * lanes
    if not _cpu_multiplies_bf16():
        return {"fp32": peak}
    return {"fp32": peak, "bf16": peak * (16 if _has_matrix_unit() else 2)}


def _has_matrix_unit() -> bool:
    return "amx_bf16" in _cpu_flags()


def _cpu_multiplies_bf16() -> bool:
    """Faster than fp32, by its flags: kernels are asked where training begins, and a plan does without torch. Intel's
    processors do so with a matrix unit alone."""
    flags = _cpu_flags()
    return "avx512_bf16" in flags and (_has_matrix_unit() or "GenuineIntel" not in flags)


@functools.cache
def _cpu_flags() -> str:
    """What this processor can, as Linux says it."""
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""


def plan(recipe: Recipe, machine: Machine) -> dict:
    """Everything `mm pretrain --plan` says, as plain values: bytes, FLOPs, tokens, seconds.

    Raises ConfigError where training would refuse the recipe on so many devices.
    """
    training, model, precision = recipe.training, recipe.model, _precision(recipe, machine)
    rank_batch, odd = divmod(training.batch_size, machine.count)
    if odd or not rank_batch:
        raise ConfigError(
            f"training.batch_size {training.batch_size} does not divide over {machine.count} devices: choose a number "
            f"of GPUs that divides it, or another batch size"
        )
    check_run(recipe, machine.count, machine.per_node)
    micro_batch = training.micro_batch_size or rank_batch
    memory = memory_per_device(recipe, machine, micro_batch)
    largest = largest_micro_batch(recipe, machine, rank_batch)
    if machine.count > 1:  # several ranks train on equal micro-batches alone
        largest = next((size for size in range(largest, 0, -1) if rank_batch % size == 0), 0)
    checkpoint = accounting.checkpoint_bytes(model)
    kept = recipe.checkpoint.keep_last
    return {
        "recipe": recipe.name,
        "model_type": model.model_type,
        "parameters": accounting.parameters(model),
        "flops_per_token": accounting.flops_per_token(model),
        "read_flops_per_token": accounting.read_flops_per_token(model, training.sequence_length),
        "training_flops_per_token": accounting.training_flops_per_token(model, training.sequence_length),
        "machine": {
            "device": machine.device, "count": machine.count, "memory_bytes": machine.memory_bytes,
            "precision": precision, "peak_flops": machine.peaks.get(peak_name(precision)),
        },
        "batch": {
            "sequence_length": training.sequence_length, "batch_size": training.batch_size,
            "batch_size_per_device": rank_batch, "micro_batch_size": micro_batch,
            "accumulation_steps": -(-rank_batch // micro_batch), "tokens_per_step": training.tokens_per_step,
            "largest_micro_batch": largest,
        },
        "memory_per_device": memory | {"fits": memory["total"] <= (1 - RESERVE) * machine.memory_bytes},
        "host_memory_per_device": host_memory_per_device(recipe, machine),
        "shards": shards_of(recipe, machine),
        "activation_checkpointing": recipe.distributed.activation_checkpointing,
        "checkpoint": {
            **checkpoint, "kept": kept,
            "disk_bytes": checkpoint["total"] * checkpoints_kept(recipe),
            "copy_bytes_per_device": checkpoint_copy(recipe, machine),
        },
        "decoding_state": accounting.decoding_state_bytes(model),
        "training": _duration(recipe, machine),
    }


def memory_per_device(recipe: Recipe, machine: Machine, micro_batch: int) -> dict[str, int]:
    """Bytes on one device at the peak of a step, by part.

    Weights, gradients and moments are a share of the whole (`shards_of`). `gradients` of a single micro-batch grow as
    the backward pass lets its activations go, and count for what they are more than these; those of accumulated
    micro-batches stay, and are whole where they are summed over ranks once a step (distributed.gradient_reduction). With
    distributed.cpu_offload these parts lie in host memory: `host_memory_per_device`. `working_copies`: bf16 weights of
    the products on one GPU (autocast keeps them for the backward pass); on several, two gathered blocks with the fp32
    gradient of one, and the gathered embedding and classifier. `loss`: a chunk of logits, and the gradients of the
    hidden states and of the classifier, made in the forward pass. On a CPU `checkpoint_copy` is memory of the same kind
    (a GPU has it in its host's), and the process itself counts: `program` (PROGRAM_BYTES) and `heap` (HEAP_SHARE). Of
    several, `collectives` are the copies that gloo reduces the largest group's gradient in.
    """
    model = recipe.model
    fp32 = _precision(recipe, machine) == "fp32"
    rounds = not fp32 and machine.is_cpu and _cpu_multiplies_bf16()  # what its products read, and keeps most of it in fp32
    compute, inner = accounting.FP32 if fp32 or rounds else 2, accounting.FP32 if fp32 else 2
    tokens = micro_batch * recipe.training.sequence_length
    states = _states(recipe, machine)
    if recipe.distributed.cpu_offload and not machine.is_cpu:
        states = dict.fromkeys(states, 0)
    parts = states | {
        "working_copies": _working_copies(recipe, machine, compute),
        "activations": accounting.activation_bytes(
            model, tokens, compute, recipe.distributed.activation_checkpointing, inner
        ),
        "loss": accounting.loss_bytes(model, tokens, compute, machine.is_cpu),
    }
    accumulated = recipe.training.batch_size > machine.count * micro_batch
    once_a_step = recipe.distributed.gradient_reduction == "step"
    if not accumulated:
        kept = accounting.kept_bytes(model, tokens, compute, recipe.distributed.activation_checkpointing, inner)
        parts["gradients"] = max(0, parts["gradients"] - kept)
    elif machine.count > 1 and once_a_step:
        parts["gradients"] += accounting.FP32 * accounting.parameters(model)["total"]
    if machine.is_cpu:
        parts["checkpoint_copy"] = checkpoint_copy(recipe, machine)
        if machine.count > 1:
            parts["collectives"] = _reduction_copies(recipe, beside_sum=accumulated and not once_a_step)
        parts |= {"heap": round(HEAP_SHARE * sum(parts.values())), "program": PROGRAM_BYTES}
    return parts | {"total": sum(parts.values())}


def checkpoint_copy(recipe: Recipe, machine: Machine) -> int:
    """Bytes of host memory in which a device's share of a checkpoint waits to be written while training goes on."""
    return -(-accounting.checkpoint_bytes(recipe.model)["total"] // machine.count) if recipe.checkpoint.asynchronous else 0


def host_memory_per_device(recipe: Recipe, machine: Machine) -> int:
    """Bytes of host memory that a GPU's share takes with distributed.cpu_offload."""
    return sum(_states(recipe, machine).values()) if recipe.distributed.cpu_offload and not machine.is_cpu else 0


def shards_of(recipe: Recipe, machine: Machine) -> int:
    """How many devices share one copy of the weights."""
    if recipe.distributed.sharding == "full":
        return machine.count
    return min(machine.count, recipe.distributed.shard_size or machine.per_node)


def _states(recipe: Recipe, machine: Machine) -> dict[str, int]:
    """A device's share of weights, gradients and AdamW's two moments, all fp32."""
    share = -(-accounting.FP32 * accounting.parameters(recipe.model)["total"] // shards_of(recipe, machine))
    return {"weights": share, "gradients": share, "optimizer": 2 * share}


def largest_micro_batch(recipe: Recipe, machine: Machine, rank_batch: int) -> int:
    """The most sequences in one forward pass that fit, at most the rank's whole batch; 0 where not even one does."""
    def fits(size: int) -> bool:
        return memory_per_device(recipe, machine, size)["total"] <= (1 - RESERVE) * machine.memory_bytes

    if fits(rank_batch):  # nothing is accumulated then, which may need less than a smaller one
        return rank_batch
    low, high = 0, rank_batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _working_copies(recipe: Recipe, machine: Machine, compute: int) -> int:
    parts = accounting.parameters(recipe.model)
    if machine.count == 1:
        products = parts["total"] - parts["by_part"]["embedding"]
        return compute * products if compute != accounting.FP32 else 0
    block = parts["blocks"] // recipe.model.num_hidden_layers
    return (2 * compute + accounting.FP32) * block + compute * parts["embedding"]


def _reduction_copies(recipe: Recipe, beside_sum: bool) -> int:
    """FSDP2 reduces the gradients of embedding and classifier, the largest group, in a copy side by side, of which gloo
    makes one of its own; `beside_sum`: where every micro-batch reduces, the gradient itself is there beside what was
    summed before."""
    return (3 if beside_sum else 2) * accounting.FP32 * accounting.parameters(recipe.model)["embedding"]


def _precision(recipe: Recipe, machine: Machine) -> str:
    if recipe.training.precision == "auto":
        return "fp32" if machine.is_cpu and not _cpu_multiplies_bf16() else "bf16"
    return recipe.training.precision


def peak_name(precision: str) -> str:
    """Whose peak utilization is measured by: fp8 speeds up some products of a bf16 run, and is compared with that."""
    return "bf16" if precision == "fp8" else precision


def _utilization(machine: Machine, precision: str) -> tuple[float, str]:
    """Share of the peak, and where that figure is from."""
    if machine.is_cpu and precision == "bf16" and _has_matrix_unit():
        return _MATRIX_MFU, _MATRIX_MFU_REASON
    return machine.mfu, machine.mfu_reason


def checkpoints_kept(recipe: Recipe) -> int:
    """The most checkpoints that lie on the disk at once: those that stay, and one that is being written."""
    steps, keep = recipe.training.total_steps, recipe.checkpoint
    written = -(-steps // keep.every)
    for_ever = steps // keep.keep_every if keep.keep_every else 0
    return min(written, keep.keep_last + 1 + for_ever) if keep.keep_last else written


def _duration(recipe: Recipe, machine: Machine) -> dict:
    """Steps, tokens, speed and time of the whole run. Speed is None where the device's peak is not known."""
    steps = recipe.training.total_steps
    tokens = steps * recipe.training.tokens_per_step
    flops = accounting.training_flops_per_token(recipe.model, recipe.training.sequence_length)
    speed = seconds = None
    precision = _precision(recipe, machine)
    peak, (mfu, reason) = machine.peaks.get(peak_name(precision)), _utilization(machine, precision)
    if peak:
        speed = mfu * peak * machine.count / flops
        seconds = tokens / speed
    return {
        "steps": steps,
        "tokens": tokens,
        "mfu": mfu,
        "mfu_reason": reason,
        "tokens_per_second": speed,
        "seconds": seconds,
        "days": seconds and seconds / 86_400,
        "gpu_hours": None if machine.is_cpu or seconds is None else machine.count * seconds / 3600,
    }

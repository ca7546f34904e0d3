"""`mm pretrain RECIPE --plan`: what a run will cost, as a table or as JSON."""

from __future__ import annotations

import json

from mmcli.terminal import make_console
from mmcore.config import Recipe


def show_plan(recipe: Recipe, gpus: str | None, as_json: bool) -> None:
    """Print the plan of `recipe` on `gpus` ("64xH100", "cpu", "2xcpu"; None: what is here). Raises ConfigError."""
    from mmcore import planning

    machine = planning.parse_machine(gpus) if gpus else planning.machine_here()
    plan = planning.plan(recipe, machine)
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    console = make_console(highlight=False)
    for table in (_model_table(plan), _memory_table(plan), _run_table(plan)):
        console.print(table)
    console.print(_verdict(plan), soft_wrap=True)


def _table(title: str, rows: list[tuple[str, str, str]]):
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table


def _model_table(plan: dict):
    parameters = plan["parameters"]
    rows = [
        ("parameters", count(parameters["total"]),
         f"{count(parameters['blocks'])} in blocks, {count(parameters['embedding'])} in embedding and classifier"),
    ]
    if parameters["without_long_term"] != parameters["total"]:
        rows.append(("without long-term memories", count(parameters["without_long_term"]), ""))
    rows += [
        ("forward, a token", flops(plan["flops_per_token"]),
         f"and {flops(plan['read_flops_per_token'])} to read the context"),
        ("training, a token", flops(plan["training_flops_per_token"]), "three times both"),
        ("checkpoint", size(plan["checkpoint"]["total"]),
         f"{size(plan['checkpoint']['disk_bytes'])} of disk with keep_last {plan['checkpoint']['kept']}"),
    ]
    return _table(f"{plan['recipe']} ({plan['model_type']})", rows)


def _memory_table(plan: dict):
    memory, machine, batch = plan["memory_per_device"], plan["machine"], plan["batch"]
    recomputed = {"none": "", "selective": ", cheap results made again", "full": ", blocks computed again"}
    notes = {
        "weights": "fp32" + (f", a share of 1/{plan['shards']}" if plan["shards"] > 1 else ""),
        "gradients": _gradients_note(memory, batch),
        "optimizer": "AdamW's two moments",
        "working_copies": f"{machine['precision']} weights in use",
        "activations": f"{batch['micro_batch_size']} x {batch['sequence_length']} tokens"
                       + recomputed[plan["activation_checkpointing"]],
        "loss": "a chunk of logits, two gradients",
        "checkpoint_copy": "written while training goes on (checkpoint.asynchronous)",
        "collectives": "copies in which gradients are summed over ranks",
        "heap": "holes between tensors, as measured",
        "program": "Python and torch",
    }
    names = {"working_copies": "working copies", "checkpoint_copy": "checkpoint copy"}
    rows = [(names.get(part, part), size(value), notes.get(part, ""))
            for part, value in memory.items() if part != "fits"]
    rows.append(("there is", size(machine["memory_bytes"]), ""))
    if plan["host_memory_per_device"]:
        rows.append(("in host memory", size(plan["host_memory_per_device"]), "distributed.cpu_offload, for each device"))
    if plan["checkpoint"]["copy_bytes_per_device"] and "checkpoint_copy" not in memory:
        note = "for each device, in host memory: " + notes["checkpoint_copy"]
        rows.append(("checkpoint copy", size(plan["checkpoint"]["copy_bytes_per_device"]), note))
    return _table(f"Memory of each {_device(machine)}", rows)


def _gradients_note(memory: dict, batch: dict) -> str:
    if batch["accumulation_steps"] == 1:
        return "in the place of activations that the backward pass lets go"
    whole = memory["gradients"] > max(memory["weights"], 1)
    return "whole until the last micro-batch (distributed.gradient_reduction)" if whole else ""


def _run_table(plan: dict):
    training, machine, batch = plan["training"], plan["machine"], plan["batch"]
    rows = [
        ("tokens", count(training["tokens"]),
         f"{training['steps']:,} steps of {count(batch['tokens_per_step'])} tokens"),
        ("micro-batch", str(batch["micro_batch_size"]), f"{batch['accumulation_steps']} a step on each device"),
        ("largest micro-batch", str(batch["largest_micro_batch"]), f"of the {batch['batch_size_per_device']} a device"),
    ]
    if training["tokens_per_second"]:
        rows += [
            ("tokens/s", f"{training['tokens_per_second']:,.0f}",
             f"at {training['mfu']:.0%} MFU of {flops(machine['peak_flops'])}/s {machine['precision']}"),
            ("time", duration(training["seconds"]), ""),
        ]
        if training["gpu_hours"] is not None:
            rows.append(("GPU-hours", f"{training['gpu_hours']:,.{0 if training['gpu_hours'] >= 100 else 1}f}", ""))
    else:
        rows.append(("tokens/s", "unknown", f"no peak is known for a {machine['device']} in {machine['precision']}"))
    where = "on this CPU" if machine["device"] == "cpu" else f"on {machine['count']} x {machine['device']}"
    return _table(f"The run {where}", rows)


def _verdict(plan: dict) -> str:
    memory, batch = plan["memory_per_device"], plan["batch"]
    lines = [f"MFU {plan['training']['mfu']:.0%}, {plan['training']['mfu_reason']}."]
    if memory["fits"]:
        lines.append("It fits.")
    elif batch["largest_micro_batch"]:
        lines.append(f"It does not fit: --set training.micro_batch_size={batch['largest_micro_batch']} does.")
    elif plan["activation_checkpointing"] != "full":
        lines.append("It does not fit: try --set distributed.activation_checkpointing=full, or more GPUs.")
    else:
        lines.append("It does not fit, even one sequence at a time: it needs more GPUs or a shorter context.")
    return "\n".join(lines)


def _device(machine: dict) -> str:
    return "process (CPU)" if machine["device"] == "cpu" else machine["device"]


def count(value: float, billion: str = "B") -> str:
    """Three digits and a unit: 9.93 B. FLOPs say G where parameters and tokens say B."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"


def flops(value: float) -> str:
    return count(value, "G") + "FLOP"


def size(value: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    """Days, hours or minutes."""
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:,.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 2 * 3600 else f"{seconds / 60:.1f} minutes"

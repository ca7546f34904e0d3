"""`mm pretrain`: a recipe in, a run folder out. `mm finetune` shares everything but the reading of the recipe."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmcore.errors import ConfigError

if TYPE_CHECKING:
    from mmcore.config import Recipe

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, such as recipes/quickstart.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of the recipe; may be repeated."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run's newest whole checkpoint.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Start over, removing what the run folder holds.")]


def pretrain(
    recipe: RecipeArgument,
    changes: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run would need: memory, days, disk.")] = False,
    gpus: Annotated[
        str | None, typer.Option("--gpus", metavar="64xH100", help="With --plan: the machines to plan for.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan: print JSON.")] = False,
) -> None:
    """Train a model on text, from a recipe.

    Ctrl-C or SIGTERM finishes the step, saves, and says how to go on; a second Ctrl-C quits at once.

    \b
    Example:
      mm pretrain recipes/quickstart.yaml
      mm pretrain recipes/quickstart.yaml --set training.steps=200 --resume
      mm pretrain recipes/8b.yaml --plan --gpus 64xH100
    """
    from mmcore.config import load_recipe

    changes = changes or []
    if not plan and (gpus or as_json):
        raise ConfigError(f"{'--gpus' if gpus else '--json'} goes with --plan: add --plan")
    resolved = load_recipe(recipe, changes)
    if plan:
        from mmcli.plan import show_plan

        show_plan(resolved, gpus, as_json)
        return
    if resolved.training.init_from:
        raise ConfigError(f"{recipe} has training.init_from: go on from a checkpoint with `mm finetune {recipe}`")
    train("pretrain", recipe, lambda: resolved, changes, resume, overwrite)


def train(
    command: str, path: Path, read: Callable[[], Recipe], changes: list[str], resume: bool, overwrite: bool
) -> None:
    """Prepare and run what `read` returns, showing it on the terminal; leaves with 128 + signal when stopped."""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict one another: keep one")
    from mmcli.console import make_view

    view = make_view(f"mm {command}", command_to_go_on(command, path, changes))
    try:
        view.say("loading torch")
        from mmcore.training.setup import Start, prepare_trainer

        start = Start(resume, overwrite)
        outcome = prepare_trainer(read(), stage=command, start=start, listeners=[view]).fit()
    finally:
        view.close()
    if outcome.status == "interrupted" and outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)


def command_to_go_on(command: str, path: Path, changes: list[str]) -> str:
    """The command line that resumes this run: a resumed recipe must be the same, overrides included."""
    words = ["mm", command, str(path)]
    for change in changes:
        words += ["--set", change]
    return shlex.join([*words, "--resume"])

"""`mm pretrain`: a recipe in, a run folder out. `mm finetune` shares everything but the reading of the recipe."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmcli import launch
from mmcli.launch import NodesOption, RanksOption, RdzvOption, RestartsOption
from mmcore.errors import CheckpointError, ConfigError, MMError

if TYPE_CHECKING:
    from mmcore.config import Recipe
    from mmcore.training.job import Outcome

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, such as recipes/quickstart.yaml.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a setting of the recipe; may be repeated."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the run's newest whole checkpoint.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Start over, removing what the run folder holds.")]
PlannedGpusOption = Annotated[
    str | None,
    typer.Option(
        "--gpus", metavar="N", help="Train on N GPUs of each node; 0: on the CPU; with --plan machines such as 64xH100."
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option("--profile", metavar="STEPS", help="Trace these steps, such as 10 or 10:13, into <run>/profile."),
]


def pretrain(
    recipe: RecipeArgument,
    changes: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    gpus: PlannedGpusOption = None,
    ranks: RanksOption = None,
    nodes: NodesOption = None,
    rdzv: RdzvOption = None,
    max_restarts: RestartsOption = None,
    profile: ProfileOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run would need: memory, days, disk.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --plan: print JSON.")] = False,
) -> None:
    """Train a model on text, from a recipe.

    Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 finishes the step, saves, and says how to go on; a second Ctrl-C quits at once.
    Exit status: 130 after Ctrl-C, 75 after another signal (saved: run it again with --resume).

    \b
    Example:
      mm pretrain recipes/quickstart.yaml
      mm pretrain recipes/quickstart.yaml --set training.steps=200 --resume
      mm pretrain recipes/quickstart.yaml --gpus 0 --ranks 2     # two processes on the CPU
      mm pretrain recipes/8b.yaml --gpus 8 --nodes 8 --rdzv node01:29500 --resume
      mm pretrain recipes/8b.yaml --plan --gpus 64xH100
    """
    changes = changes or []
    if plan:
        for name, value in (("--ranks", ranks), ("--nodes", nodes), ("--rdzv", rdzv), ("--max-restarts", max_restarts),
                            ("--profile", profile)):  # fmt: skip
            if value is not None:
                raise ConfigError(f"{name} does not go with --plan: leave one of them out")
        _show_plan(recipe, changes, gpus, as_json)
        return
    if as_json:
        raise ConfigError("--json goes with --plan: add --plan")
    ask = launch.read_launch(gpus, ranks, nodes, rdzv, max_restarts)
    command = Command("pretrain", recipe, changes, resume, overwrite, profile)

    def read() -> Recipe:
        from mmcore.config import load_recipe

        resolved = load_recipe(recipe, changes)
        if resolved.training.init_from:
            raise ConfigError(f"{recipe} has training.init_from: go on from a checkpoint with `mm finetune {recipe}`")
        return resolved

    train(command, read, ask)


def _show_plan(recipe: Path, changes: list[str], gpus: str | None, as_json: bool) -> None:
    from mmcli.plan import show_plan
    from mmcore.config.words import whole_number

    if gpus is not None and whole_number(gpus) is not None:
        raise ConfigError(f"--plan --gpus {gpus}: say which GPUs, such as {gpus}xH100")
    show_plan(_recipe_to_plan(recipe, changes), gpus, as_json)


def _recipe_to_plan(path: Path, changes: list[str]) -> Recipe:
    """The recipe, with its checkpoint's model where it begins with one. A stage can be planned before the one that it goes
    on from has run, if the recipe says itself what model that is."""
    from mmcore.config import load_recipe, read_recipe

    recipe = load_recipe(path, changes)
    source = recipe.training.init_from
    if source is None:
        return recipe
    says_itself = "hidden_size" in (read_recipe(path, tuple(changes)).get("model") or {})
    if os.path.exists(source):
        from mmcore.training.finetune import load_finetune_recipe

        try:
            return load_finetune_recipe(path, changes)
        except CheckpointError:  # a run that has none yet
            if not says_itself:
                raise
    if not says_itself:
        raise ConfigError(f"{path} takes its model from training.init_from, and there is no {source}: name a checkpoint")
    return recipe


class Command:
    """What was asked of `mm pretrain` or `mm finetune`, but for the processes to run it in."""

    def __init__(self, name: str, path: Path, changes: list[str], resume: bool, overwrite: bool, profile: str | None):
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite contradict one another: keep one")
        self.name, self.path, self.changes = name, path, changes
        self.resume, self.overwrite = resume, overwrite
        self.profile = read_steps(profile)

    def words(self) -> list[str]:
        """The same command for a rank."""
        words = [self.name, str(self.path)]
        for change in self.changes:
            words += ["--set", change]
        for option, given in (("--resume", self.resume), ("--overwrite", self.overwrite)):
            words += [option] if given else []
        return [*words, "--profile", f"{self.profile[0]}:{self.profile[1]}"] if self.profile else words

    def to_go_on(self, asked: launch.Launch | None = None) -> str:
        """The command line that resumes this run: a resumed recipe must be the same, overrides included."""
        if launch.GO_ON in os.environ:
            return os.environ[launch.GO_ON]
        words = ["mm", self.name, str(self.path)]
        for change in self.changes:
            words += ["--set", change]
        words += asked.words() if asked else []
        line = shlex.join([*words, "--resume"])
        return f"torchrun ... -m {line.replace('mm', 'mmcli', 1)}" if launch.Rank.here().launched else line


def train(command: Command, read: Callable[[], Recipe], asked: launch.Launch | None) -> None:
    """Train what `read` returns, here or in the processes that were asked for.

    Leaves with status 130 after Ctrl-C, and with 75 after another signal.
    """
    if asked is not None:
        read()  # a mistake in the recipe is told before any process is started
        launch.hand_over(asked, command.words(), command.to_go_on(asked))
    here = launch.Rank.here()
    try:
        outcome = _train_here(command, read, here)
    except MMError as error:
        launch.report_failure(str(error))
        raise
    if outcome.status == "interrupted" and outcome.signal is not None:
        import signal

        raise typer.Exit(128 + outcome.signal if outcome.signal == signal.SIGINT else launch.REQUEUE)


def _train_here(command: Command, read: Callable[[], Recipe], here: launch.Rank) -> Outcome:
    """Prepare and run, shown on the terminal by rank 0 and written into its log by every rank of several."""
    from mmcli.console import PlainView, make_view

    title, go_on, recipe = f"mm {command.name}", command.to_go_on(), read()
    with contextlib.ExitStack() as closing:
        taken_over = closing.enter_context(contextlib.ExitStack())  # the trainer hears signals from its first step on
        if not here.launched:
            taken_over.enter_context(stopped_before_training())
        views = []
        if here.rank == 0:
            views.append(make_view(title, go_on))
            closing.callback(views[0].close)
            views[0].say("loading torch")
        from mmcore.training.run_folder import room_errors

        closing.enter_context(room_errors(recipe.run_folder))  # a log may be what finds no room, also as it is closed
        if here.size > 1:
            log = closing.enter_context(launch.open_log(recipe.run_folder, here))
            views.append(PlainView(title, go_on, log))
            closing.enter_context(launch.failures_to(log, here))
        from mmcore.training.setup import Start, prepare_trainer

        start = Start(command.resume, command.overwrite)
        if here.restarts and not (command.overwrite and not launch.begun_since_launch(recipe.run_folder)):
            start = Start(resume=True)
        listeners = [*views, FailureReport()]
        trainer = prepare_trainer(recipe, stage=command.name, start=start, listeners=listeners, profile=command.profile)
        taken_over.close()
        return trainer.fit()


@contextlib.contextmanager
def stopped_before_training() -> Iterator[None]:
    """Leave with one sentence and a scheduler's status at a signal that asks to stop: preparing data may take hours.

    Ranks that a launcher started are left to it. What was prepared is kept, as after a kill at any moment.
    """
    import signal

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def leave(number: int, _frame: object) -> None:
        what = f"{signal.Signals(number).name} before the first step: nothing was trained, run the same command again"
        print(f"mm: {what}", file=sys.stderr, flush=True)
        raise SystemExit(launch.REQUEUE)

    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class FailureReport:
    """A listener that leaves the name of a rank that hangs for the launcher, where the view's rank may be that one."""

    def __call__(self, event) -> None:
        from mmcore.training.events import Hung

        if isinstance(event, Hung):
            launch.report_failure(event.text)


def read_steps(text: str | None) -> tuple[int, int] | None:
    """The first and the last step of "10" or "10:13". Raises ConfigError."""
    if text is None:
        return None
    from mmcore.config.words import whole_number

    first, _, last = text.partition(":")
    begin, end = whole_number(first), whole_number(last or first)
    if begin is None or end is None or not 1 <= begin <= end:
        raise ConfigError(f"--profile {text}: give a step or the first and the last one, such as 10 or 10:13")
    return begin, end

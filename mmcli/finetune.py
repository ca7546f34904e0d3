"""`mm finetune`: go on from a checkpoint."""

from __future__ import annotations

from mmcli.launch import GpusOption, NodesOption, RanksOption, RdzvOption, RestartsOption, read_launch
from mmcli.pretrain import Command, OverwriteOption, ProfileOption, RecipeArgument, ResumeOption, SetOption, train


def finetune(
    recipe: RecipeArgument,
    changes: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    gpus: GpusOption = None,
    ranks: RanksOption = None,
    nodes: NodesOption = None,
    rdzv: RdzvOption = None,
    max_restarts: RestartsOption = None,
    profile: ProfileOption = None,
) -> None:
    """Go on from the checkpoint that the recipe names in training.init_from.

    With a longer training.sequence_length this is the long-context stage; with data.kind: conversations (JSONL rows
    with `messages`) the loss is on the assistant's words, and the chat template is saved with the result. The
    recipe's model section may change the context (max_position_embeddings, long_term_delay) and nothing else.
    Signals and exit status are those of `mm pretrain`, whose --plan says what such a recipe would need too.

    \b
    Example:
      mm finetune recipes/chat.yaml --set training.init_from=runs/stories
      mm finetune recipes/8b-32k.yaml --gpus 8
    """
    changes = changes or []
    command = Command("finetune", recipe, changes, resume, overwrite, profile)

    def read():
        from mmcli.launch import Rank
        from mmcore.training.finetune import load_finetune_recipe

        return load_finetune_recipe(recipe, changes, resume or Rank.here().restarts > 0)

    train(command, read, read_launch(gpus, ranks, nodes, rdzv, max_restarts))

"""`mm finetune`: go on from a checkpoint."""

from __future__ import annotations

from mmcli.pretrain import OverwriteOption, RecipeArgument, ResumeOption, SetOption, train


def finetune(
    recipe: RecipeArgument,
    changes: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Go on from the checkpoint that the recipe names in training.init_from.

    With a longer training.sequence_length this is the long-context stage; with data.kind: conversations (JSONL rows
    with `messages`) the loss is on the assistant's words, and the chat template is saved with the result. The
    recipe's model section may change the context (max_position_embeddings, long_term_delay) and nothing else.

    \b
    Example:
      mm finetune recipes/chat.yaml --set training.init_from=runs/stories
    """

    def read():
        from mmcore.training.finetune import load_finetune_recipe

        return load_finetune_recipe(recipe, changes or [], resume)

    train("finetune", recipe, read, changes or [], resume, overwrite)

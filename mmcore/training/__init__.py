"""Training: `setup.prepare_trainer(recipe)` makes a `trainer.Trainer`, whose `fit()` runs to the recipe's last step.

    schedule.py    learning rate and long-term delay, pure functions of the step
    optimizer.py   AdamW, and its state under the parameters' names
    step.py        gradients over micro-batches, the check that they are finite
    trainer.py     the loop: steps, validation, checkpoints, interrupts
    events.py      what a trainer tells its listeners
    metrics.py     listeners that write metrics.jsonl and TensorBoard files
    setup.py       from a recipe to a trainer; finetune.py reads a fine-tuning recipe
    run_folder.py  the folder of a run
"""

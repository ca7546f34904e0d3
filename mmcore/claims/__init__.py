"""The paper's claims at a size that anyone can train: `make claims`.

    languages.py   generated text whose difficulty is a few numbers: facts and questions, anonymous classes
    trial.py       one model trained on one of them, or on real text, by the trainer that trains everything
    measure.py     accuracy at sizes that were never trained
    plan.py        which trials: learning rates, seeds, ablations
    work.py        many trials at a time, and none twice
    report.py, sections.py, tables.py, figures.py   docs/claims
"""

"""Operations of the model that decide its speed.

Each folder `<op>/` holds one public function in `__init__.py` (shapes, dtypes, equation), the definition of
right in `reference.py`, and faster forms beside it: `blocked.py` (PyTorch), `cpu.py` with C, `triton.py` for GPUs.
`dispatch.py` chooses between them, and `registry.py` makes them operators of torch, which torch.compile, FSDP2 and
activation checkpointing treat as they treat torch's own.
"""

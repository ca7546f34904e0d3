"""How one step is spread over processes and devices.

The model knows a single device. `mesh` says which process this is, `reduce` adds numbers up over the
processes, and `parallelize` applies recomputation and compilation to a model from outside.
"""

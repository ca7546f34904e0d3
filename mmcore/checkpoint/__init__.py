"""Checkpoints: whole or absent, verified, and free of pickle.

    disk.py        durable files and folders that appear under their name in one step
    tensorfile.py  safetensors: headers read with distrust, shards written tensor by tensor
    manifest.py    sizes and hashes of a training checkpoint's files
    names.py       which tensors a model has, and what others call them (no I/O)
    rows.py        which rows of a tensor a rank holds, writes and reads
    sharded.py     shards.json: which rows lie in which file of a checkpoint of several ranks
    integrity.py   whether a training checkpoint is whole, found out by all ranks together
    host_copy.py   the copy in memory from which a checkpoint is written while training goes on
    writer.py      saving, by one rank or many, in the background
    retention.py   which checkpoints stay
    contents.py    what a training checkpoint holds beside its tensors
    store.py       training checkpoints: save, find, read back
    resolve.py     what the user typed -> the checkpoint that is meant
    formats/       one Checkpoint from a training checkpoint, an exported or Hugging Face folder, a file of PyTorch's or
                   llama2.c's
    load.py        load_model, load_tokenizer
    hub.py         what transformers needs beside the weights
    layerwise.py   a model run one block at a time
    resumable.py   a temporary folder that outlives its writer
    targets.py     what a conversion writes: an exported folder, a run to train on, a file of PyTorch's
    certificate.py the proof that two checkpoints are one model
    convert.py     from any readable format to any target, with a certificate
    verify.py      what was converted, checked again later
"""

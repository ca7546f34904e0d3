"""Checkpoints: whole or absent, verified, and free of pickle.

    disk.py        durable files and folders that appear under their name in one step
    tensorfile.py  safetensors: headers read with distrust, shards written tensor by tensor
    manifest.py    sizes and hashes of a training checkpoint's files
    names.py       which tensors a model has, and what others call them (no I/O)
    rows.py        which rows of a tensor a rank holds, writes and reads
    sharded.py     shards.json: which rows lie in which file of a checkpoint of several ranks
    integrity.py   whether a training checkpoint is whole, found out by all ranks together
    staging.py     the copy in memory from which a checkpoint is written while training goes on
    writer.py      saving, by one rank or many, in the background
    retention.py   which checkpoints stay
    contents.py    what a training checkpoint holds beside its tensors
    store.py       training checkpoints: save, find, read back
    resolve.py     what the user typed -> the checkpoint that is meant
    formats/       one Checkpoint from a training checkpoint, an exported or Hugging Face folder, a llama2.c file
    load.py        load_model, load_tokenizer
    convert.py     from any readable format to an exported folder, with a certificate
"""

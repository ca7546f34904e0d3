"""Checkpoints: whole or absent, verified, and free of pickle.

    disk.py        durable files and folders that appear under their name in one step
    tensorfile.py  safetensors: headers read with distrust, shards written tensor by tensor
    manifest.py    sizes and hashes of a training checkpoint's files
    names.py       which tensors a model has, and what others call them (no I/O)
    store.py       training checkpoints: save, find, purge, read back
    resolve.py     what the user typed -> the checkpoint that is meant
    formats/       one Checkpoint from a training checkpoint, an exported or Hugging Face folder, a llama2.c file
    load.py        load_model, load_tokenizer
    convert.py     from any readable format to an exported folder, with a certificate
"""

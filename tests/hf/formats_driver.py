"""Two calls of transformers on each of some folders, in a process of its own (test_every_format.py).

    python formats_driver.py JOBS RESULTS

JOBS is a .json of {"tokens": [...], "new_tokens": N, "folders": {name: folder}}; RESULTS the .pt that is written: name ->
(class, dtype, logits of the tokens, the ids that generate() adds greedily). The network is refused.
"""

import json
import os
import socket
import sys
from pathlib import Path

JOBS, RESULTS = sys.argv[1:]
os.environ["HF_HUB_OFFLINE"] = "1"


def refuse(*args, **kwargs):
    raise AssertionError(f"something asked for the network: {args[1:]}")


socket.socket.connect = socket.socket.connect_ex = refuse

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

jobs = json.loads(Path(JOBS).read_text())
tokens = torch.tensor(jobs["tokens"])
results = {}
for name, folder in jobs["folders"].items():
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, trust_remote_code=True)
    assert not any(info.values()), (name, info)
    model.eval()
    with torch.no_grad():
        logits = model(tokens).logits
    ids = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0, eos_token_id=None,
                         max_new_tokens=jobs["new_tokens"])[:, tokens.shape[1]:]  # fmt: skip
    results[name] = (type(model).__name__, str(model.dtype), logits.float(), ids.tolist())
assert not any(name.partition(".")[0] == "mmcore" for name in sys.modules)
torch.save(results, RESULTS)

"""What a user of transformers does with an exported folder, run by test_exported_folder.py in a process of its own.

    python driver.py ROUTE FOLDER CASES RESULTS

ROUTE is `import` (mmcore.hf registers the classes) or `remote` (trust_remote_code, and mmcore cannot be imported).
CASES is a .json with tokens and texts, RESULTS the .pt that is written. The network is refused, and so is every
warning, of Python's or of transformers' log.
"""

import json
import logging
import os
import socket
import sys
import warnings
from pathlib import Path

ROUTE, FOLDER, CASES, RESULTS = sys.argv[1:]
os.environ["HF_HUB_OFFLINE"] = "1"


def refuse(*args, **kwargs):
    raise AssertionError(f"something asked for the network: {args[1:]}")


socket.socket.connect = socket.socket.connect_ex = refuse


class Blocker:
    """Makes mmcore unimportable."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mmcore", "mmcli"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)


if ROUTE == "remote":
    sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402

logged = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("transformers").addHandler(handler)
warnings.simplefilter("error")

trust = {"trust_remote_code": True} if ROUTE == "remote" else {}
if ROUTE == "import":
    import mmcore.hf  # noqa: F401

cases = json.loads(Path(CASES).read_text())
tokens = torch.tensor(cases["tokens"])
results = {}

# Loading.
config = AutoConfig.from_pretrained(FOLDER, **trust)
model, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True, **trust)
base, base_info = AutoModel.from_pretrained(FOLDER, output_loading_info=True, **trust)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, **trust)
results["config"] = (type(config).__name__, config.model_type, config.architectures, str(config.dtype))
results["classes"] = (type(model).__name__, type(base).__name__)
results["home"] = type(model).__module__
results["info"] = [{key: sorted(map(str, value)) for key, value in i.items()} for i in (info, base_info)]
results["dtype"] = str(model.dtype)
model.eval()
base.eval()


@torch.no_grad()
def logits(model, *args, **kwargs):
    return model(*args, **kwargs).logits


# Forward passes.
results["logits"] = logits(model, tokens)
documents = torch.tensor(cases["documents"])
results["packed"] = logits(model, tokens, document_ids=documents)
positions = torch.cat([torch.arange(len(list(run))) for run in cases["runs"]])[None].expand_as(tokens)
results["packed by positions"] = logits(model, tokens, position_ids=positions)
results["base"] = base(tokens).last_hidden_state.detach()
out = model(tokens, labels=tokens, output_hidden_states=True, use_cache=False)
results["loss"] = out.loss.item()
results["hidden"] = [tuple(h.shape) for h in out.hidden_states]
results["tuple"] = type(model(tokens, return_dict=False)).__name__
model.train()
plain = model(tokens, labels=tokens).loss
plain.backward()
gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
model.zero_grad()
switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.x
getattr(model, f"{switch}_checkpointing_enable")()
model(tokens, labels=tokens).loss.backward()
results["checkpointed"] = max((p.grad - gradients[name]).abs().max().item() for name, p in model.named_parameters())
results["no gradient"] = [name for name, gradient in gradients.items() if not gradient.abs().max() > 0]
model.zero_grad()
getattr(model, f"{switch}_checkpointing_disable")()
model.eval()

# Generation.
length = cases["new_tokens"]


def generate(ids, **kwargs):
    kwargs = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False,
              "attention_mask": torch.ones_like(ids)} | kwargs  # fmt: skip
    return model.generate(ids, **kwargs)


prompt = tokens[:1, :11]
results["greedy"] = generate(prompt)[0, 11:].tolist()
results["greedy uncached"] = generate(prompt, use_cache=False)[0, 11:].tolist()
for beams in (2, 4):
    for cached in (True, False):
        results[f"{beams} beams {'cached' if cached else 'uncached'}"] = generate(
            tokens[:2, :11], num_beams=beams, use_cache=cached, num_return_sequences=2
        ).tolist()
draws = []
for seed in (5, 5, 6):
    torch.manual_seed(seed)
    draws.append(generate(prompt, do_sample=True, temperature=1.5, top_k=40, top_p=0.95)[0].tolist())
results["sampled"] = draws

prompts = cases["prompts"]
longest = max(map(len, prompts))
padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
results["left-padded"] = generate(padded, attention_mask=mask)[:, longest:].tolist()
results["left-padded uncached"] = generate(padded, attention_mask=mask, use_cache=False)[:, longest:].tolist()
results["left-padded beams"] = generate(padded, attention_mask=mask, num_beams=3)[:, longest:].tolist()
results["alone beams"] = [generate(torch.tensor([p]), num_beams=3)[0, len(p):].tolist() for p in prompts]

CACHE = sys.modules[type(model).__module__].CACHE
cache = model(tokens[:1, :7], use_cache=True)[CACHE]
results["continued"] = generate(prompt, **{CACHE: cache})[0, 11:].tolist()
streamed = []
streamer = type("Ids", (), {"put": lambda self, x: streamed.extend(x.flatten().tolist()), "end": lambda self: None})()
generate(prompt, streamer=streamer)
results["streamed"] = streamed[11:]

# What cannot be done is refused.
refusals = {}
for name, call in {
    "documents": lambda: generate(prompt, document_ids=documents[:1, :11]),
    "static": lambda: generate(prompt, cache_implementation="static"),
    "foreign": lambda: generate(prompt, **{CACHE: transformers.DynamicCache()}),
    "assisted": lambda: generate(prompt, assistant_model=model),
    "crop": lambda: cache.crop(3),
    "hole": lambda: model(tokens[:1, :2], attention_mask=torch.tensor([[1] * 14 + [0, 1]]), cache=cache),
    "attentions": lambda: model(tokens, output_attentions=True),
}.items():
    try:
        call()
        refusals[name] = "done"
    except ValueError as error:
        refusals[name] = str(error)
results["refusals"] = refusals

# Tokenizer, chat, pipeline.
results["ids"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in cases["texts"]]
results["texts"] = [tokenizer.decode(ids) for ids in results["ids"]]
results["begun"] = tokenizer(cases["texts"][0])["input_ids"]
results["special"] = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side)
results["chats"] = [
    tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] for messages in cases["chats"]
]
results["generation"] = model.generation_config.to_diff_dict()
batch = tokenizer(cases["texts"][:3], return_tensors="pt", padding=True)
written = generate(batch["input_ids"], attention_mask=batch["attention_mask"])
results["batch"] = (batch["input_ids"].tolist(), written[:, batch["input_ids"].shape[1]:].tolist())
talk = pipeline("text-generation", model=FOLDER, **trust)
results["pipeline"] = talk(cases["texts"][0], max_new_tokens=length, do_sample=False, return_full_text=False)[0]["generated_text"]
results["pipeline chat"] = talk(cases["chats"][0], max_new_tokens=length, do_sample=False)[0]["generated_text"][-1]

# Half precision, and the way back.
half = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16, **trust).eval()
results["half"] = logits(half, tokens).float()
results["half greedy"] = [
    half.generate(prompt, do_sample=False, max_new_tokens=4, use_cache=cached)[0].tolist() for cached in (True, False)
]
saved = str(Path(RESULTS).parent / "saved")
model.save_pretrained(saved)
tokenizer.save_pretrained(saved)
again, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True, **trust)
results["saved info"] = {key: sorted(map(str, value)) for key, value in info.items()}
results["saved equal"] = torch.equal(logits(again.eval(), tokens), results["logits"])
results["saved ids"] = AutoTokenizer.from_pretrained(saved, **trust)(cases["texts"][0])["input_ids"]
results["saved auto_map"] = json.loads((Path(saved) / "config.json").read_text()).get("auto_map")

results["logged"] = logged
results["mmcore"] = any(name.partition(".")[0] == "mmcore" for name in sys.modules)
torch.save(results, RESULTS)

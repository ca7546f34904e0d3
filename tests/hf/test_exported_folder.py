"""An exported folder in the hands of transformers: mmcore.hf imported, or its own modules with mmcore out of reach.

driver.py does what users do, in a process for each route with the network refused and warnings made errors; here
its results are held to this project's own model, engine and tokenizer.
"""

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch

import mmcore
from mmcore.checkpoint import hub
from mmcore.data import ChatFormat, load_tokenizer
from mmcore.generation.conversation import ChatTemplate
from tests.hf.folders import SCRIPTS, export_mosaic, trained_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed: pip install 'mm[hf]'"),
]

ROOT = Path(__file__).parents[2]
NEW = 23
RUNS = (7, 1, 20, 9)
CHATS = (
    [{"role": "user", "content": "Hello there!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "人人生而自由"},
     {"role": "assistant", "content": "Yes.\n\nNo: 🎉."}, {"role": "user", "content": "  indented\tx \n"}],
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder as `mm convert --to hf` leaves it, and what is to be done with it."""
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = trained_tokenizer()
    export_mosaic(folder / "exported", tokenizer)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, tokenizer.vocab_size, (3, sum(RUNS)), generator=generator)
    cases = {
        "tokens": tokens.tolist(),
        "documents": [[i for i, n in enumerate(RUNS) for _ in range(n)]] * 3,
        "runs": [[0] * n for n in RUNS],
        "new_tokens": NEW,
        "prompts": [tokens[0, :n].tolist() for n in (13, 5, 1, 9)],
        "texts": SCRIPTS,
        "chats": CHATS,
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    return SimpleNamespace(folder=folder, path=folder / "exported", tokenizer=tokenizer, tokens=tokens,
                           prompts=cases["prompts"], model=mmcore.load_model(folder / "exported"))


@pytest.fixture(scope="module", params=["import", "remote"])
def found(request, exported):
    """What the driver found on one route."""
    folder = exported.folder / request.param
    folder.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    alone = ["-I"] if request.param == "remote" else []
    if not alone:
        environment["PYTHONPATH"] = str(ROOT)
    (folder / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, *alone, str(Path(__file__).with_name("driver.py")), request.param, str(exported.path),
         str(exported.folder / "cases.json"), str(folder / "results.pt")],
        cwd=folder / "empty", env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(route=request.param, **{name.replace(" ", "_").replace("-", "_"): value for name, value in
                           torch.load(folder / "results.pt", weights_only=True).items()})


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float = 3e-5) -> None:
    """Equal but for fp32's rounding, which these lively weights amplify; test_modeling.py compares in fp64."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())


def greedy(exported, prompt, count=NEW) -> list[int]:
    return list(mmcore.generate(exported.model, prompt, max_new_tokens=count, stop_ids=()))


def test_it_loads_as_what_it_is(found):
    assert found.config == ("MemoryMosaicConfig", "memory_mosaics_v2", ["MemoryMosaicForCausalLM"], "torch.float32")
    assert found.classes == ("MemoryMosaicForCausalLM", "MemoryMosaicModel")
    assert not any(itertools.chain(*(info.values() for info in found.info)))
    assert found.dtype == "torch.float32"
    assert found.mmcore == (found.route == "import")
    assert found.home.startswith("mmcore.hf" if found.route == "import" else "transformers_modules")


def test_nothing_is_warned_of(found):
    assert found.logged == []


@torch.no_grad()
def test_forward_passes_are_the_models(found, exported):
    model, tokens = exported.model, exported.tokens
    near(found.logits, model(tokens))
    documents = torch.tensor([[i for i, n in enumerate(RUNS) for _ in range(n)]] * 3)
    near(found.packed, model(tokens, documents=documents))
    near(found.packed_by_positions, model(tokens, documents=documents))
    near(found.base, model.hidden(tokens))
    expected = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)
    assert found.hidden == [(3, sum(RUNS), 32)] * 3
    assert found.tuple == "tuple"


def test_it_trains_with_and_without_checkpointing(found):
    assert found.no_gradient == []
    assert found.checkpointed < 1e-6


def test_greedy_generation_is_mmcores_token_for_token(found, exported):
    expected = greedy(exported, exported.tokens[0, :11].tolist())
    assert found.greedy == found.greedy_uncached == found.continued == found.streamed == expected


def test_beams_with_a_cache_are_those_without(found):
    for beams in (2, 4):
        cached, uncached = (getattr(found, f"{beams}_beams_{how}") for how in ("cached", "uncached"))
        assert cached == uncached and len(cached) == 4
    assert found.__dict__["2_beams_cached"] != found.__dict__["4_beams_cached"]


def test_left_padded_rows_read_as_each_alone(found, exported):
    assert found.left_padded == found.left_padded_uncached == [greedy(exported, prompt) for prompt in exported.prompts]
    assert found.left_padded_beams == found.alone_beams
    ids, written = found.batch
    expected = [[exported.tokenizer.bos_id, *exported.tokenizer.encode(text)] for text in SCRIPTS[:3]]
    assert [row[len(row) - len(alone):] for row, alone in zip(ids, expected, strict=True)] == expected
    assert written == [greedy(exported, prompt) for prompt in expected]


def test_the_seed_decides_what_is_sampled(found):
    first, again, other = found.sampled
    assert first == again != other


def test_what_a_mosaic_cannot_do_is_said(found):
    said = found.refusals
    assert "leave document_ids out" in said["documents"]
    assert "has its own cache" in said["static"]
    assert "a Memory Mosaic needs a MemoryMosaicCache" in said["foreign"]
    assert "stateful" in said["assisted"]
    assert "cannot forget" in said["crop"]
    assert "pad on the left" in said["hole"]
    assert "leave output_attentions out" in said["attentions"]


def test_the_tokenizer_gives_the_same_ids(found, exported):
    tokenizer = exported.tokenizer
    assert found.ids == [tokenizer.encode(text) for text in SCRIPTS]
    assert found.texts == list(SCRIPTS)
    assert found.begun == found.saved_ids == [tokenizer.bos_id, *tokenizer.encode(SCRIPTS[0])]
    assert found.special == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_id, "left")


def test_the_chat_template_frames_as_training_and_mm_chat_do(found, exported):
    framing, template = ChatFormat(exported.tokenizer), ChatTemplate(exported.tokenizer.chat_template, exported.tokenizer)
    assert found.chats == [framing.prompt(messages) for messages in CHATS] == [template.ids(messages) for messages in CHATS]


def test_generation_settings(found, exported):
    end, turn = exported.tokenizer.eos_id, exported.tokenizer.special("<|eot_id|>")
    given = {key: value for key, value in found.generation.items() if key != "transformers_version"}
    assert given == hub.CHAT_SAMPLING | {"bos_token_id": exported.tokenizer.bos_id, "eos_token_id": [end, turn],
                                         "pad_token_id": end}


def test_pipelines_write_the_same_text(found, exported):
    tokenizer, stops = exported.tokenizer, exported.model.stop_ids
    theirs = tokenizers.Tokenizer.from_file(str(exported.path / "tokenizer.json"))

    def written(ids):
        answer = greedy(exported, ids)
        # bytes that are no UTF-8, which untrained weights write, become more or fewer U+FFFD in the tokenizers library
        return theirs.decode(list(itertools.takewhile(lambda i: i not in stops, answer)))

    assert found.pipeline == written([tokenizer.bos_id, *tokenizer.encode(SCRIPTS[0])])
    assert found.pipeline_chat == {"role": "assistant", "content": written(ChatFormat(tokenizer).prompt(CHATS[0]))}


@torch.no_grad()
def test_half_precision(found, exported):
    exact = exported.model(exported.tokens)
    assert found.half.isfinite().all()
    assert (found.half - exact).abs().mean() < 0.1 * exact.abs().mean()
    cached, uncached = found.half_greedy
    assert cached == uncached


def test_what_transformers_saves_is_whole(found, exported):
    assert not any(found.saved_info.values())
    assert found.saved_equal
    assert found.saved_auto_map == hub.AUTO_MAP
    saved = exported.folder / found.route / "saved"
    assert {path.name for path in saved.glob("*.py")} == set(hub.MODULES)
    with torch.no_grad():
        assert torch.equal(mmcore.load_model(saved)(exported.tokens), exported.model(exported.tokens))
    again = load_tokenizer(saved)
    assert [again.encode(text) for text in SCRIPTS] == [exported.tokenizer.encode(text) for text in SCRIPTS]

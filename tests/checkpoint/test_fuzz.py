"""A slice of the fuzzer's cases with a fixed seed, and the fuzzer itself held to readers with planted defects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", *words], cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_three_thousand_spoiled_files_are_refused_or_whole(tmp_path):
    """100,000 and more: python -m tests.checkpoint.fuzz_readers --count 100000 --seed S."""
    done = run("-m", "tests.checkpoint.fuzz_readers", "--count", "3000", "--seed", "1", "--json", str(tmp_path / "found.json"))
    assert done.returncode in (0, 1), done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["defects"], found["defects"][:5]
    assert found["cases"] == 3000 and len(found["targets"]) > 20
    assert found["outcomes"]["refused"] > 1500 and found["outcomes"]["whole"] > 100


PLANTED = """
import argparse, ctypes, json, os, socket, subprocess, sys, time
from pathlib import Path
from mmcore.errors import CheckpointError
from tests.checkpoint import fuzz_readers
from tests.checkpoint.fuzz_seeds import Target

def crash(folder): ctypes.string_at(0)
def hang(folder):
    while True: time.sleep(0.01)
def wide(folder): bytearray(1 << 30)
def outside(folder): open("/etc/hostname").close()
def writes(folder): open(folder / "new", "w").close()
def program(folder): subprocess.run(["true"])
def other(folder): raise KeyError("name")
def said(folder): raise CheckpointError("two\\nlines \\x1b[2J")
def fine(folder): raise CheckpointError("this is refused")

readers = [crash, hang, wide, outside, writes, program, other, said, fine]
def build(root):
    made = []
    for reader in readers:
        folder = root / reader.__name__
        folder.mkdir()
        (folder / "a").write_bytes(b"seed")
        # the unspoiled file is read without harm
        calm = lambda folder, reader=reader: None if (folder / "a").read_bytes() == b"seed" else reader(folder)
        made.append(Target(reader.__name__, folder, "a", lambda draw, data: data + b"!", calm, 1.0))
    return made

fuzz_readers.build = build
fuzz_readers.PIECE = 1
options = argparse.Namespace(count=40, seed=1, seconds=0.05, megabytes=200, only=None, case=None, json=None, verbose=False)
print(json.dumps(fuzz_readers.fuzz(options)))
"""


def test_the_fuzzer_sees_every_kind_of_defect():
    done = run("-c", PLANTED)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    seen = {(defect["target"], defect["defect"].split(" at ")[0].split(":")[0]) for defect in found["defects"]}
    kinds = dict(sorted(seen))
    assert kinds.pop("?").startswith("the reader crashed or hung (killed by signal 11")
    assert kinds == {
        "hang": "took longer than 0.05 s", "wide": "MemoryError", "outside": "opened outside", "writes": "opened to write",
        "program": kinds["program"], "other": "KeyError", "said": "its message is not one printable line",
    }  # fmt: skip
    assert kinds["program"].startswith(("subprocess.Popen", "opened outside"))
    assert found["targets"]["fine"]["refused"] > 0 and "fine" not in kinds

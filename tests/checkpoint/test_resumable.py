"""An interrupted conversion goes on; a stale one is cleared away; nothing half-written has a name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmcore.checkpoint import tensorfile
from mmcore.checkpoint.convert import convert_checkpoint
from mmcore.checkpoint.formats import open_checkpoint, write_exported
from mmcore.checkpoint.resumable import JOURNAL, resumable_folder, staging_key
from mmcore.errors import CheckpointError
from tests.checkpoint.small import MOSAIC, same, weights

KEY = staging_key({"a": 1})


def source_in(folder):
    return write_exported(folder / "source", MOSAIC, weights())


def interrupted(monkeypatch, source, target, shards, **options):
    """Convert until `shards` shards are finished, then press Ctrl-C; the staging folder that is left."""
    original, count = tensorfile._write_shard, 0

    def write(*arguments):
        nonlocal count
        if count == shards:
            raise KeyboardInterrupt
        count += 1
        return original(*arguments)

    monkeypatch.setattr(tensorfile, "_write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, max_shard_bytes=4000, **options)
    monkeypatch.setattr(tensorfile, "_write_shard", original)
    return [path for path in target.parent.iterdir() if ".tmp-" in path.name]


def written_shards(monkeypatch):
    """Names of the shards that are written from now on."""
    names, original = [], tensorfile._write_shard

    def write(path, *arguments):
        names.append(path.name)
        return original(path, *arguments)

    monkeypatch.setattr(tensorfile, "_write_shard", write)
    return names


@pytest.mark.parametrize("to", ["hf", "train"])
def test_finished_shards_are_not_written_again(tmp_path, monkeypatch, to):
    source, target = source_in(tmp_path), tmp_path / "out"
    (left,) = interrupted(monkeypatch, source, target, 3, to=to)
    assert not target.exists() and (left / JOURNAL).read_text().count("\n") == 3
    names = written_shards(monkeypatch)
    convert_checkpoint(source, target, max_shard_bytes=4000, to=to)
    model = [name for name in names if name.startswith("model")]
    assert len(model) > 3 and model[0].startswith("model-00004-of-")
    assert same(weights(), open_checkpoint(target).tensors)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"] and not list(target.rglob(JOURNAL))


def test_a_shard_that_was_altered_in_between_is_written_again(tmp_path, monkeypatch):
    source, target = source_in(tmp_path), tmp_path / "out"
    (left,) = interrupted(monkeypatch, source, target, 3)
    shards = sorted(left.glob("model-*"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"?")
    shards[1].unlink()
    os.symlink("/etc/hostname", shards[1])
    (left / "half-written").write_text("x")
    names = written_shards(monkeypatch)
    convert_checkpoint(source, target, max_shard_bytes=4000)
    assert [name[6:11] for name in names][:3] == ["00001", "00002", "00004"]
    assert same(weights(), open_checkpoint(target).tensors) and not (target / "half-written").exists()


def test_another_source_or_option_starts_anew_and_clears_the_stale_one(tmp_path, monkeypatch):
    source, target = source_in(tmp_path), tmp_path / "out"
    (first,) = interrupted(monkeypatch, source, target, 2)
    (second,) = interrupted(monkeypatch, source, target, 2, dtype=torch.bfloat16)
    assert first != second and not first.exists()
    write_exported(source, MOSAIC, weights(seed=9), force=True)
    names = written_shards(monkeypatch)
    convert_checkpoint(source, target, max_shard_bytes=4000)
    assert names[0].startswith("model-00001") and same(weights(seed=9), open_checkpoint(target).tensors)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_nothing_is_left_of_a_conversion_that_failed_or_had_finished_nothing(tmp_path, monkeypatch):
    source, target = source_in(tmp_path), tmp_path / "out"
    assert interrupted(monkeypatch, source, target, 0) == []
    with pytest.raises(RuntimeError), resumable_folder(target, KEY) as staging:
        (staging.path / "file").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["source"]


def test_two_at_once_do_not_mix(tmp_path):
    with resumable_folder(tmp_path / "out", KEY) as staging:
        (staging.path / "mine").write_text("x")
        with pytest.raises(CheckpointError, match="another process is writing"), resumable_folder(tmp_path / "out", KEY):
            pass
        assert (staging.path / "mine").exists()
    assert (tmp_path / "out/mine").exists()


def test_a_torn_journal_counts_as_far_as_it_goes(tmp_path):
    folder = tmp_path / f"out.tmp-{KEY}"
    folder.mkdir()
    record = tensorfile.write_tensors(folder, "model", {"a": torch.ones(2)}, {"a": tensorfile.TensorSpec(torch.float32, (2,))})
    (name, what), = record.items()
    (folder / JOURNAL).write_text(f'["{name}", {what.bytes}, "{what.sha256}"]\n["other", 5, "ab')
    (folder / "other").write_text("torn")
    with resumable_folder(tmp_path / "out", KEY) as staging:
        assert set(staging.done) == {name} and sorted(os.listdir(folder)) == [JOURNAL, name]


DRIVER = """
import sys, time
from pathlib import Path
from mmcore.checkpoint import tensorfile
from mmcore.checkpoint.convert import convert_checkpoint
original = tensorfile._write_shard
def slow(path, *arguments):
    record = original(path, *arguments)
    time.sleep(0.05)
    return record
tensorfile._write_shard = slow
print("ready", flush=True)
convert_checkpoint(sys.argv[1], sys.argv[2], max_shard_bytes=1500)
"""


@pytest.mark.slow
def test_a_killed_process_is_gone_on_with(tmp_path, monkeypatch):
    """SIGKILL while shards are being written, twice."""
    source, target = source_in(tmp_path), tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    counts = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", DRIVER, source, target], stdout=subprocess.PIPE, text=True,
                                   env=environment, cwd=Path(__file__).parents[2])  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        before = counts[-1] if counts else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and lines(tmp_path) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not target.exists()
        counts.append(lines(tmp_path))
    assert counts[1] >= counts[0] + 2 >= 4
    names = written_shards(monkeypatch)
    convert_checkpoint(source, target, max_shard_bytes=1500)
    assert names[0] >= f"model-{counts[1] + 1:05d}" and same(weights(), open_checkpoint(target).tensors)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def lines(folder):
    """Shards that the journal names."""
    journals = list(folder.glob(f"*.tmp-*/{JOURNAL}"))
    return journals[0].read_text().count("\n") if journals else 0

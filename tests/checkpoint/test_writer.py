"""The writer of one process: in the background, at most one at a time, and nothing that fails there stays there."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from mmcore.checkpoint import disk
from mmcore.checkpoint.formats.modelconfig import config_json
from mmcore.checkpoint.store import load_state, save_checkpoint, whole_checkpoints
from mmcore.checkpoint.writer import CheckpointWriter
from mmcore.distributed.mesh import World
from mmcore.errors import CheckpointError
from tests.checkpoint.small import MOSAIC, moments, same, save, weights


def writer(folder, **options):
    return CheckpointWriter(folder, World(), **{"keep_last": 0, **options})


def begin(saver, step, model=None, optimizer=None, **options):
    model = weights(MOSAIC, step) if model is None else model
    optimizer = moments(model, step) if optimizer is None else optimizer
    saver.save(step, model=model, optimizer=optimizer, state={"at": step}, config=config_json(MOSAIC, torch.float32), **options)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def gate(monkeypatch):
    """Writes to the disk wait until the gate is opened."""
    opened, real = threading.Event(), os.write

    def write(descriptor, data):
        assert opened.wait(30)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    return opened


def test_what_changes_after_save_returns_is_not_what_is_written(tmp_path, gate):
    saver, model = writer(tmp_path), weights(MOSAIC, 1)
    optimizer = moments(model, 1)
    begin(saver, 1, model, optimizer)
    assert saver.busy and saver.poll() is None and whole_checkpoints(tmp_path) == []
    for tensor in (*model.values(), *optimizer.values()):
        tensor.fill_(7.0)
    gate.set()
    path = saver.wait()
    assert path == tmp_path / "checkpoints/step-000001" and saver.poll() is None and not saver.busy
    read = load_state(path, verify=True)
    assert same(weights(MOSAIC, 1), read.model) and same(moments(weights(MOSAIC, 1), 1), read.optimizer)
    assert saver.timing.step == 1 and saver.timing.stalled_seconds > 0 and saver.timing.background_seconds > 0


def test_one_save_at_a_time_and_each_is_handed_out_once(tmp_path):
    saver, found = writer(tmp_path), []
    for step in range(1, 6):
        begin(saver, step)
        found.append(saver.poll())
    found += [saver.wait(), saver.wait(), saver.poll()]
    assert [path.name for path in found if path] == names(tmp_path) == [f"step-{step:06d}" for step in range(1, 6)]


def test_the_copies_use_the_same_memory_again(tmp_path):
    saver = writer(tmp_path)
    begin(saver, 1)
    first = {tensor.data_ptr() for tensor in saver._save.tensors["optimizer"].values()}
    begin(saver, 2)
    assert {tensor.data_ptr() for tensor in saver._save.tensors["optimizer"].values()} == first
    saver.wait()
    assert [same(weights(MOSAIC, step), load_state(path).model) for step, path in
            zip((2, 1), whole_checkpoints(tmp_path), strict=True)] == [True, True]  # fmt: skip


def test_without_asynchronous_nothing_is_copied_and_nothing_is_left_to_do(tmp_path):
    saver = writer(tmp_path, asynchronous=False)
    begin(saver, 1)
    assert not saver.busy and names(tmp_path) == ["step-000001"] and not saver._host_copy._buffers
    assert saver.poll().name == "step-000001" and saver.timing.background_seconds == 0


@pytest.mark.parametrize("how", ["poll", "wait", "save"])
def test_what_fails_in_the_background_is_raised_in_front(tmp_path, monkeypatch, how):
    save(tmp_path, 1)
    saver, real = writer(tmp_path), os.write

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    begin(saver, 2)
    saver._save.thread.join()
    with pytest.raises(CheckpointError, match="the disk is full.*earlier checkpoints are untouched"):
        {"poll": saver.poll, "wait": saver.wait, "save": lambda: begin(saver, 3)}[how]()
    assert names(tmp_path) == ["step-000001"] and not saver.busy
    monkeypatch.setattr(os, "write", real)
    begin(saver, 3)
    assert saver.wait().name == "step-000003"


def test_weights_that_are_no_numbers_are_found_in_the_copy(tmp_path):
    saver, model = writer(tmp_path), weights(MOSAIC, 1)
    model["lm_head.weight"][3, 3] = float("nan")
    begin(saver, 1, model)
    model["lm_head.weight"][3, 3] = 0.0
    with pytest.raises(CheckpointError, match="lm_head.weight holds NaN or infinity"):
        saver.wait()
    assert names(tmp_path) == []


def test_what_can_be_known_at_once_is_raised_at_once(tmp_path):
    saver = writer(tmp_path)
    with pytest.raises(CheckpointError, match="do not belong together"):
        begin(saver, 1, {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="is without its other moment"):
        begin(saver, 1, optimizer={"exp_avg.lm_head.weight": torch.zeros(37, 16)})
    assert not saver.busy and not (tmp_path / "checkpoints").exists()


def test_a_disk_that_hangs_is_given_up(tmp_path, gate):
    saver = writer(tmp_path, patience=0.2)
    begin(saver, 1)
    thread = saver._save.thread
    with pytest.raises(CheckpointError, match=r"not written within 0 seconds \(ranks still writing: 0\)"):
        saver.wait()
    gate.set()
    thread.join()


def test_closing_lets_a_save_end(tmp_path, gate):
    saver = writer(tmp_path)
    begin(saver, 1)
    threading.Timer(0.2, gate.set).start()
    saver.close()
    assert len(whole_checkpoints(tmp_path)) == 1 and not saver.busy


def test_a_checkpoint_of_the_model_alone(tmp_path):
    saver = writer(tmp_path)
    begin(saver, 1, optimizer={})
    path = saver.wait()
    assert not (path / "optimizer.safetensors").exists()
    read = load_state(path, verify=True)
    assert same(weights(MOSAIC, 1), read.model) and len(read.optimizer) == 0


# -- which are kept --------------------------------------------------------------------------------------------


def test_some_steps_stay_for_ever(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert names(tmp_path) == ["step-000003", "step-000006", "step-000007"]
    save(tmp_path, 8, keep_last=2, keep_every=3)
    assert names(tmp_path) == ["step-000003", "step-000006", "step-000007", "step-000008"]


def test_what_another_process_reads_stays_until_it_has_done(tmp_path):
    path = save(tmp_path, 1)
    code = "import sys; from mmcore.checkpoint.disk import Hold; from pathlib import Path\n"
    code += "held = Hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    reader = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert reader.stdout.readline() == b"held\n"
    save(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    reader.communicate()
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path) == ["step-000003"]


def test_an_open_checkpoint_is_being_read(tmp_path):
    read = load_state(save(tmp_path, 1))
    save(tmp_path, 2, keep_last=1)
    assert same(moments(weights(MOSAIC, 1), 1), read.optimizer) and len(names(tmp_path)) == 2
    del read
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path) == ["step-000003"]


def test_a_hold_on_what_is_gone_holds_nothing(tmp_path):
    disk.Hold(tmp_path / "nowhere")
    save_checkpoint(tmp_path, 1, model=weights(), optimizer={}, state={}, config=config_json(MOSAIC, torch.float32))
    assert len(names(tmp_path)) == 1


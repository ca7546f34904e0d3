"""Threads where a container grants less time than the machine has processors."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mmcore import planning, processors


def machine(root, groups, files):
    """A tree as Linux shows it: /proc/self/cgroup, and files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CASES = {
    "version 2, in a container": ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
    "version 2, no limit": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "version 2, a limit above": (
        "0::/pods.slice/one\n", {"pods.slice/cpu.max": "150000 100000", "pods.slice/one/cpu.max": "max 100000"}, 1.5),
    "version 2, the smaller counts": (
        "0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 50000"}, 2.0),
    "version 1": (
        "5:memory:/x\n3:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000",
                                              "cpu,cpuacct/x/cpu.cfs_period_us": "100000"}, 0.5),
    "version 1, no limit": ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    "version 1, a path of the host's": (
        "1:cpu:/docker/0123\n", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0),
    "version 1 beside 2": (
        "1:cpu:/x\n0::/x\n", {"cpu/x/cpu.cfs_quota_us": "100000", "cpu/x/cpu.cfs_period_us": "100000"}, 1.0),
    "nothing there": ("0::/\n", {}, None),
    "garbage": ("\x00no\n::\n0::/\n", {"cpu.max": "many\n"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_group_grants(name, tmp_path):
    groups, files, wanted = CASES[name]
    assert processors.granted(machine(tmp_path, groups, files)) == wanted


def test_no_groups_at_all(tmp_path):
    assert processors.granted(tmp_path) is None


@pytest.mark.parametrize("grant, wanted", [("10000 100000", 1), ("140000 100000", 1), ("190000 100000", 2),
                                           ("99900000 100000", 8)])  # fmt: skip
def test_whole_processors_and_no_more_than_are_there(grant, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "bound", lambda: 8)
    assert processors.allowed(machine(tmp_path, "0::/\n", {"cpu.max": grant})) == wanted


@pytest.fixture
def quota(monkeypatch):
    """Less than one processor of 64 is granted, and nobody has said how many threads there shall be."""
    monkeypatch.setattr(processors, "granted", lambda *_: 0.5)
    monkeypatch.setattr(processors, "bound", lambda: 64)
    monkeypatch.setattr(processors, "_chosen", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that whatever there is comes back
    monkeypatch.delenv("OMP_NUM_THREADS")


def test_commands_keep_to_it(quota):
    processors.keep_to_quota()
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_what_the_user_says_holds(quota, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    processors.keep_to_quota()
    environment = dict(os.environ)
    processors.share(environment, 2)
    assert os.environ["OMP_NUM_THREADS"] == environment["OMP_NUM_THREADS"] == "7"


def test_ranks_share_what_is_allowed(quota, monkeypatch):
    monkeypatch.setattr(processors, "granted", lambda *_: 8.0)
    processors.keep_to_quota()
    assert os.environ["OMP_NUM_THREADS"] == "8"
    environment = dict(os.environ)
    processors.share(environment, 3)
    assert environment["OMP_NUM_THREADS"] == "2"
    processors.share(environment, 3)
    assert environment["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("grant", [None, 64.0, 100.0])
def test_nothing_is_set_where_nothing_binds(grant, quota, monkeypatch):
    monkeypatch.setattr(processors, "granted", lambda *_: grant)
    processors.keep_to_quota()
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_plan_counts_what_is_granted(monkeypatch):
    monkeypatch.setattr(planning.psutil, "cpu_count", lambda logical=True: 64)
    monkeypatch.setattr(planning.psutil, "cpu_freq", lambda: SimpleNamespace(max=2000.0, current=2000.0))
    peaks = []
    for granted in (2, 64, 128):
        monkeypatch.setattr(processors, "allowed", lambda *_, granted=granted: granted)
        peaks.append(planning._cpu_peaks()["fp32"])
    assert peaks[1] == peaks[2] == 32 * peaks[0]


def test_mm_keeps_to_it_before_torch_is_there():
    """Or the variable would come too late."""
    code = (
        "import os, sys\n"
        "from mmcore import processors\n"
        "processors.granted, processors.bound = lambda *_: 3.0, lambda: 64\n"
        "from mmcli import app\n"
        "app.run = lambda arguments: print(os.environ['OMP_NUM_THREADS'], 'torch' in sys.modules)\n"
        "app.main()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.stdout.split() == ["3", "False"], found.stderr

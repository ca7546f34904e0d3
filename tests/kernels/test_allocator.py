import platform
import subprocess
import sys

import pytest

from mmcore.kernels import allocator

# In a process of its own: the setting cannot be taken back.
FAULTS = """
import resource, sys, torch
from mmcore.kernels.allocator import keep_pages
if sys.argv[1] == "keep":
    assert keep_pages() is None and keep_pages() is None
def faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.empty(10 << 20).fill_(1)  # 40 MiB: above 32, malloc maps each tensor afresh
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(24)  # aligned blocks are not reused at once: the heap settles at a few tensors more than are alive
print(faults(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc keeps pages on request")
def test_pages_are_kept():
    counts = {}
    for mode in ("leave", "keep"):
        result = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        counts[mode] = int(result.stdout)
    assert counts["keep"] < 100 < counts["leave"], counts


def test_elsewhere_it_says_why_and_does_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "darwin" in allocator.keep_pages.__wrapped__()

"""Kept pages: a tensor freed and made again touches no fresh page."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from mmcore.kernels.allocator import keep_pages
reason = keep_pages() if {kept} else None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        kept = [torch.ones(megabytes << 18) for megabytes in range(1, 40, 3)]
        del kept[::2], kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(reason if reason else faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_freed_memory_is_used_again():
    def run(kept):
        code = CODE.format(kept=kept)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    kept = run(True)
    if not kept.isdigit():
        pytest.skip(kept)
    assert 10 * int(kept) < int(run(False))


def test_pages_can_be_given_back_at_any_time():
    from mmcore.kernels.allocator import give_back_pages

    held = bytearray(10_000_000)
    give_back_pages()
    assert len(held) == 10_000_000

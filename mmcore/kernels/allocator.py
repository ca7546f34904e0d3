"""Keeping the memory that large temporary tensors give back."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@functools.cache
def keep_pages() -> str | None:
    """Ask glibc's malloc to keep freed pages and reuse them; returns None, or the reason why nothing was done.

    For this process and for good; calling it again changes nothing. As it comes, malloc maps a tensor of more than
    32 MiB afresh each time, and the kernel zeroes each of its pages on the first touch. Single allocations above
    1 GiB still go back to the system.

    Measured on 2 shared cores, forward + backward of 16,384 tokens, processor time before -> after: gated_scan 45-63
    -> 12-18 ms, rms_norm (512 wide) 12-35 -> 11-14, swiglu (1,536 wide) 260 -> 47-67 (73,731 page faults a call -> 0);
    `python -m tests.benchmarks.bench_gated_scan`, with and without --leave-pages. In a training step of 4,096 tokens
    whose tensors are 8 to 24 MB (4 layers of these operations and their linear maps, d 512, d' 1536, AdamW) page
    faults fall from 24,000-26,000 to 4,400 a step and the kernel's share from 70-82 to 18 ms of 4,500: 1 %, and no
    more than noise in the whole step. Peak memory 1,432-1,453 MB without, 1,475 MB with.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return f"only glibc's malloc on Linux can be told to keep its pages, and this is {sys.platform}"
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(_M_MMAP_THRESHOLD, 1 << 30) != 1 or mallopt(_M_TRIM_THRESHOLD, -1) != 1:
        return "malloc refused the settings M_MMAP_THRESHOLD and M_TRIM_THRESHOLD"
    return None

"""Kept pages: a tensor freed and made again touches no fresh page."""

import subprocess
import sys

import pytest
import torch

from mmcore.kernels import allocator

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


@pytest.mark.slow
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
    held = bytearray(10_000_000)
    allocator.give_back_pages()
    assert len(held) == 10_000_000


def test_large_tensors_are_whole_and_writable():
    for shape in ((), (0, 3), (5, 7), (3, 1 << 20)):
        x = allocator.empty(shape, torch.float16)
        assert x.shape == shape and x.dtype == torch.float16 and x.is_contiguous()
        x.fill_(2)
        assert (x == 2).all()


def test_a_module_moves_with_its_numbers_ties_and_gradients():
    first, second = torch.nn.Linear(1024, 2048), torch.nn.Linear(1024, 2048).bfloat16()
    tied = torch.nn.Linear(1024, 2048)
    tied.weight = first.weight
    first.register_buffer("steps", torch.arange(9))
    module = torch.nn.ModuleList([first, second, tied])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    places = first.weight.data_ptr()
    allocator.move_to_huge_pages(module)
    assert first.weight.data_ptr() != places and tied.weight is first.weight
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name
    first(torch.ones(1, 1024)).sum().backward()
    assert torch.equal(first.weight.grad, torch.ones(2048, 1024))

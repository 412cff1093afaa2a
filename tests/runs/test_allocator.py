"""The allocator keeps what is freed: the same tensors again cost no page faults."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from rlmeta.runs.allocator import keep_freed_memory
assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(1 << 20) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_tensors_of_the_same_sizes_cost_no_new_pages() -> None:
    out = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True)
    assert int(out.stdout) < 100  # 4 blocks of 1,024 pages, 20 times over

"""What training on a CPU asks of the allocator."""

import platform
import subprocess
import sys

import pytest

# Pages that a round of allocations, 192 MiB in all, takes from the system after some others.
PAGES = """
import resource
import torch
from tiue.devices import keep_freed_memory

assert keep_freed_memory() is {keeps}
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an allocator of another kind")
def test_freed_memory_is_kept():
    script = PAGES.format(keeps=True)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    pages = int(done.stdout)
    assert pages < 1000  # of 49,152


def test_nothing_changes_without_glibc():
    without = "import platform; platform.libc_ver = lambda: ('', '')\n" + PAGES.format(keeps=False)
    subprocess.run([sys.executable, "-c", without], check=True, capture_output=True)

"""What malloc does with large blocks that are freed, seen in the pages that a loop touches."""

import subprocess
import sys

import pytest

LOOP = """
import resource, sys, torch
from harness.training.tuning.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.set_num_threads(1)
def step():  # 80 MiB that are freed again, in blocks beyond what malloc ever keeps by itself
    return [torch.ones(10 * 2**20) for _ in range(2)]
for _ in range(10):  # until the blocks have found their places
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_step_finds_the_pages_of_the_one_before():
    faults = {}
    for how in ("usual", "kept"):
        ended = subprocess.run(
            [sys.executable, "-c", LOOP, how], capture_output=True, text=True, check=True
        )
        faults[how] = int(ended.stdout)
    # 800 MiB are 204,800 pages of 4 KiB, or 400 of 2 MiB where the system makes them huge
    assert faults["usual"] >= 400
    assert faults["kept"] < 100

"""OpenMP counts a thread that receives, and only then."""

import subprocess
import sys

import pytest

PROGRAM = """
import os
import torch
from modelcache.openmp import counted

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads({threads})
before = threads()
with counted():
    inside = threads()
while threads() > before:  # It was joined, and may still be seen for a moment.
    pass
print(inside - before, torch.get_num_threads())
"""


@pytest.mark.parametrize(("threads", "others"), [(1, 0), (2, 1), (8, 1)])
def test_a_team_of_one_more_thread_is_there_while_it_receives(threads, others):
    run = [sys.executable, "-c", PROGRAM.format(threads=threads)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed.split() == [str(others), str(threads)]

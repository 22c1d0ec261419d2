"""Memory between tensors that live long goes back to the system."""

import ctypes
import subprocess
import sys

import pytest

HOLES = """
import torch
from nanoquant.heap import give_back
from nanoquant.memory import resident_bytes
torch.ones(1 << 22).sum()  # 16 MB, freed: from here on glibc takes smaller ones from the heap
tensors = [torch.ones(1 << 18) for _ in range(200)]  # 1 MB each
tensors[1::2] = [None] * 100
before = resident_bytes()["VmRSS"]
give_back()
print(before - resident_bytes()["VmRSS"], all(bool((t == 1).all()) for t in tensors[::2]))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_holes_between_living_tensors_are_given_back():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True)
    freed, whole = done.stdout.split()
    assert int(freed) > 80e6 and whole == "True"

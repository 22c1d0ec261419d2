"""Marks of tests that need what not every machine has."""

import shutil

import pytest

from nanoquant_kernels.cpu_build import COMPILERS

compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="torch.compile on a CPU needs a C++ compiler"
)

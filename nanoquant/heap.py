"""Freed memory that the C library keeps for itself, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Return free pages of the heap to the system; does nothing where the C library is not glibc.

    Tensors that live long among many that do not keep glibc from returning the pages between them.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

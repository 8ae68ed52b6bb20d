"""Memory that was freed goes back to the system, so that what a process holds is what it uses."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

_M_ARENA_MAX = -8  # from malloc.h


def give_back() -> None:
    """Return freed memory to the system, where the C library can do so when asked (glibc).

    Its heap keeps what is freed between two allocations that live on. Weights of a few megabytes leave such holes,
    and after many blocks the holes are larger than a block.
    """
    if trim := _of_the_c_library("malloc_trim"):
        trim(0)


def share_one_heap() -> None:
    """Make all threads allocate from one heap (glibc); call before they are started.

    By default every thread has a heap of its own, and each keeps the largest hole its sweeps ever left.
    """
    if mallopt := _of_the_c_library("mallopt"):
        mallopt(_M_ARENA_MAX, 1)


@cache
def _of_the_c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None

"""Memory that was freed goes back to the system, so that what a process holds is what it uses."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back() -> None:
    """Return freed memory to the system, where the C library can do so when asked (glibc).

    Its heap keeps what is freed between two allocations that live on. Weights of a few megabytes leave such holes,
    and after many blocks the holes are larger than a block.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

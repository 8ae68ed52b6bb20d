"""Resident memory: what is freed goes back to the system, and the peak of a stretch of work is measured."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # from malloc.h
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch reads it before it makes its first tensor


def give_back() -> None:
    """Return freed memory to the system, where the C library can do so when asked (glibc).

    Its heap keeps what is freed between two allocations that live on. Weights of a few megabytes leave such holes,
    and after many blocks the holes are larger than a block.
    """
    if trim := _of_the_c_library("malloc_trim"):
        trim(0)


def ask_for_huge_pages() -> None:
    """Let torch ask the system (Linux) to back large tensors with huge pages; call before torch is imported.

    A matrix of a large model is mapped anew by every operation that makes one, and clearing its small pages one by one
    takes longer than the operation. What the user's environment says of this stays.
    """
    os.environ.setdefault(_HUGE_PAGES, "1")


def configure_heap() -> None:
    """Keep the heap (glibc) from growing by what it once held; the earlier it is called, the better.

    All threads allocate from one heap: by default every thread has its own, and each keeps the largest hole its sweeps
    ever left. Where huge pages make that cheap, tensors of 4 MB and more lie outside of it, and leave no holes.
    """
    if mallopt := _of_the_c_library("mallopt"):
        mallopt(_M_ARENA_MAX, 1)
        if os.environ.get(_HUGE_PAGES) == "1":
            mallopt(_M_MMAP_THRESHOLD, 4 << 20)


@cache
def _of_the_c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Without the garbage collector, for short work that makes no garbage, such as importing torch: a tenth faster."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class PeakMemory:
    """Largest resident memory while the block runs, above what was resident when it began.

        with PeakMemory() as memory:
            ...
        memory.bytes        # above the baseline
        memory.total        # the peak itself

    Linux resets the kernel's high-water mark when the block begins. Where that is not allowed, and on macOS, the mark
    is of the whole process: then `exact` is False and an earlier, higher peak hides this one.
    """

    def __init__(self) -> None:
        self.baseline = 0
        self.total = 0
        self.exact = False

    @property
    def bytes(self) -> int:
        return max(self.total - self.baseline, 0)

    def __enter__(self) -> PeakMemory:
        gc.collect()  # garbage that goes away in the middle would hide as much of the peak,
        give_back()  # and so would free holes in the heap that are still resident
        self.exact = _reset_mark()
        self.baseline = _status("VmRSS") or _high_water_mark()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.read()

    def read(self) -> int:
        """Bytes above the baseline up to now."""
        self.total = _high_water_mark()
        return self.bytes


def _reset_mark() -> bool:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def high_water_mark(process: int) -> int:
    """Largest resident memory so far of another process, in bytes; 0 where the system does not tell."""
    return _status("VmHWM", str(process))


def _high_water_mark() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str, process: str = "self") -> int:
    """A size in bytes from /proc/.../status, 0 where there is none."""
    with suppress(OSError):
        for line in Path("/proc", process, "status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
    return 0

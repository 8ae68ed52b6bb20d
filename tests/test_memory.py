"""The peak of a stretch of work, whatever the heap looked like before it."""

from __future__ import annotations

import pytest

from penjing.memory import PeakMemory


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory() as memory:
        block = bytearray(200_000_000)
        block[::4096] = b"x" * len(block[::4096])
        del block
    if not memory.exact:
        pytest.skip("this system does not let a process reset its memory mark")
    assert 190_000_000 < memory.bytes < 260_000_000
    with PeakMemory() as later:
        pass
    assert later.bytes < 50_000_000


def test_free_holes_in_the_heap_do_not_hide_the_peak():
    chunks = [bytearray(100_000) for _ in range(2_000)]  # below the size from which the C library maps pages directly
    for chunk in chunks:
        chunk[::4096] = b"x" * len(chunk[::4096])
    last = bytearray(100_000)
    del chunk, chunks  # 200 MB of holes below `last`
    with PeakMemory() as memory:
        block = bytearray(150_000_000)
        block[::4096] = b"x" * len(block[::4096])
        del block
    del last
    if not memory.exact:
        pytest.skip("this system does not let a process reset its memory mark")
    assert 140_000_000 < memory.bytes < 200_000_000

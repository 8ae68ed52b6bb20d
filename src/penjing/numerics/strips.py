"""A matrix a few rows at a time: what is computed from them stays in the cache, and scratch memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""In one strip: 512 kB in fp32, half of a small second-level cache. A GPU wants fewer and larger pieces of work."""


def strips(matrix: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of `matrix` (N, K), in order; one where it is small."""
    rows, columns = matrix.shape
    height = max(1, ELEMENTS.get(matrix.device.type, ELEMENTS["cuda"]) // max(columns, 1))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))

"""A matrix a few rows at a time: what is computed from them stays in the cache, and scratch memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

ELEMENTS = 1 << 20
"""In one strip: 4 MB in fp32. Larger scratch is mapped anew by every operation, and that takes longer."""


def strips(shape: Sequence[int]) -> Iterator[slice]:
    """Slices that cover the rows of a matrix `shape` (N, K), in order; one where the matrix is small."""
    rows, columns = shape
    height = max(1, ELEMENTS // max(columns, 1))
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))

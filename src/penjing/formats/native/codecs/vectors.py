"""Sums of entries of a few books of vectors.

weight_codes  uint8: entry numbers, (N, G, M) in row order, one bit stream (see `packing`)
weight_books  (M, 2**book_bits, d)
weight_scale  (N, 1)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.formats.native.codecs.base import Parts, stream, stream_bytes
from penjing.numerics.vectors import VectorGrid
from penjing.representations import VectorCoded


class VectorCodec:
    """`VectorGrid`."""

    name = "vectors"
    grid = VectorGrid
    all_parts: tuple[str, ...] = ("codes", "books", "scale")

    def parts(self, grid: VectorGrid) -> tuple[str, ...]:
        """All of them."""
        return self.all_parts

    def entry(self, grid: VectorGrid) -> dict[str, Any]:
        """Every field of the grid."""
        dtype = str(grid.table_dtype).removeprefix("torch.")
        sizes = {"books": grid.books, "book_bits": grid.book_bits, "dimension": grid.dimension}
        return {**sizes, "table_dtype": dtype}

    def read_grid(self, entry: Mapping[str, Any]) -> VectorGrid:
        """The grid with these fields."""
        sizes = (entry["books"], entry["book_bits"], entry["dimension"])
        return VectorGrid(*sizes, getattr(torch, entry["table_dtype"]))

    def nbytes(self, shape: tuple[int, ...], grid: VectorGrid, kept: int) -> int:
        """Codes at their exact width, books and scales; every weight is stored, whatever `kept`."""
        numbers = math.prod(self._books(grid)) + shape[0]
        codes = shape[0] * grid.runs(shape[1]) * grid.books
        return stream_bytes(codes, grid.book_bits) + numbers * grid.table_dtype.itemsize

    def write(self, weight: VectorCoded, kept: Tensor | None) -> dict[str, Tensor]:
        """The bit stream, books and scales; a plan never pairs this grid with a mask."""
        codes = stream(weight.codes, weight.grid.book_bits)
        return {"codes": codes, "books": weight.books.contiguous(), "scale": weight.scale.contiguous()}

    def read(self, parts: Parts, shape: tuple[int, int], grid: VectorGrid, kept: Tensor | None) -> VectorCoded:
        """Codes, books and scales in their own types."""
        rows, columns = shape
        sizes = (rows, grid.runs(columns), grid.books)
        codes = parts.codes("codes", grid.book_bits, math.prod(sizes)).reshape(sizes)
        return VectorCoded(codes, parts.take("books", *self._books(grid)), parts.take("scale", rows, 1), grid, columns)

    def _books(self, grid: VectorGrid) -> tuple[int, int, int]:
        return grid.books, 2**grid.book_bits, grid.dimension


CODEC = VectorCodec()

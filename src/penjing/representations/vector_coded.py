"""A matrix whose consecutive weights are sums of entries of a few books of short vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics.vectors import VectorGrid


@dataclass(frozen=True)
class VectorCoded:
    """Codes on a `VectorGrid`: N rows, K columns in G runs of d.

    codes  uint8 (N, G, M): which entry of each book
    books  (M, 2**book_bits, d) in the grid's `table_dtype`
    scale  (N, 1) in the same
    grid   sizes
    """

    codes: Tensor
    books: Tensor
    scale: Tensor
    grid: VectorGrid
    columns: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.codes), self.columns))

    def dense(self) -> Tensor:
        """The matrix in fp32: entries are summed book by book, then scaled."""
        return self.grid.decode(self.codes, self.books.float(), self.scale.float())[:, : self.columns]

    def nbytes(self) -> int:
        stored = self.books.numel() * self.books.element_size() + self.scale.numel() * self.scale.element_size()
        return -(-self.codes.numel() * self.grid.book_bits // 8) + stored

    def rows(self, start: int, stop: int) -> VectorCoded:
        """The same for outputs `start` to `stop` only."""
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop])

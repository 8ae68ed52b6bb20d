"""A matrix of few distinct values: codes, and the tables they point into."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics.codebooks import CodebookGrid


@dataclass(frozen=True)
class Codebook:
    """Codes on a `CodebookGrid`.

    codes   uint8 (N, K): which entry of its table a weight is
    tables  (N, G, 2**bits), or (1, 1, 2**bits) for one table in all, in the grid's `table_dtype`
    grid    how tables are shared
    """

    codes: Tensor
    tables: Tensor
    grid: CodebookGrid

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dense(self) -> Tensor:
        """The matrix in fp32: entries as they are stored."""
        return self.grid.decode(self.codes, self.tables)

    def nbytes(self) -> int:
        """With codes of one length; Huffman codes take less."""
        return -(-self.codes.numel() * self.grid.bits // 8) + self.tables.numel() * self.tables.element_size()

    def rows(self, start: int, stop: int) -> Codebook:
        """The same for outputs `start` to `stop` only."""
        tables = self.tables if self.grid.group_size == "tensor" else self.tables[start:stop]
        return replace(self, codes=self.codes[start:stop], tables=tables)

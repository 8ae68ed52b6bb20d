"""Codes whose scales and zeros are codes too."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics.bilevel import BilevelGrid, Statistics


@dataclass(frozen=True)
class Bilevel:
    """Codes on a `BilevelGrid`: N rows, K columns in G groups.

    codes        uint8 (N, K), 0 <= code < 2**bits
    statistics   scale and zero of each group and row: codes (2, G, N), second level (2, G, R)
    grid         the grid the codes lie on
    group_index  int32 (K,): the group each column belongs to; None when groups are consecutive columns
    """

    codes: Tensor
    statistics: Statistics
    grid: BilevelGrid
    group_index: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dense(self) -> Tensor:
        """The decoded matrix in fp32: `scale * (codes - zero)`."""
        columns = self.codes.shape[1]
        group = torch.arange(columns) // self.grid.group_size if self.group_index is None else self.group_index.long()
        scale, zero = (part.T[:, group] for part in self.statistics.values())
        return self.grid.decode(self.codes.float(), scale, zero)

    def nbytes(self) -> int:
        codes = -(-self.codes.numel() * self.grid.bits // 8)
        statistics = -(-self.statistics.codes.numel() * self.grid.statistic_bits // 8)
        second = 2 * self.statistics.step.numel() * self.grid.scale_dtype.itemsize
        return codes + statistics + second + (0 if self.group_index is None else self.codes.shape[1] * 4)

    def rows(self, start: int, stop: int) -> Bilevel:
        """The same for outputs `start` to `stop` only; ValueError unless `start` begins a row group."""
        size = self.grid.statistic_group
        if start % size:
            raise ValueError(f"rows that share scales cannot be split: {start} is not a multiple of {size}")
        groups, whole = slice(start // size, self.grid.row_groups(stop)), self.statistics
        part = Statistics(whole.codes[..., start:stop], whole.step[..., groups], whole.bottom[..., groups], size)
        return replace(self, codes=self.codes[start:stop], statistics=part)

"""A matrix as a few planes of signs and the scales that multiply them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics import binary_coding
from penjing.numerics.binary_coding import BinaryGrid, Levels


@dataclass(frozen=True)
class BinaryCoded:
    """Codes on a `BinaryGrid`.

    codes   uint8 (N, K): bit i is 1 where the sign of plane i is +1
    alpha   (N, G, bits) in the grid's `scale_dtype`
    offset  (N, G) in the grid's `offset_dtype`; None on a grid without offsets
    grid    the grid the codes lie on
    """

    codes: Tensor
    alpha: Tensor
    offset: Tensor | None
    grid: BinaryGrid

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dense(self) -> Tensor:
        """The decoded matrix in fp32: `sum_i +-alpha_i + offset`, summed in this order."""
        columns = self.codes.shape[1]
        width = self.grid.columns_per_group(columns)
        values = torch.empty(self.codes.shape, device=self.codes.device)
        for group, start in enumerate(range(0, columns, width)):
            members = slice(start, start + width)
            offset = self.alpha.new_zeros(len(self.codes)) if self.offset is None else self.offset[:, group]
            levels = Levels(self.alpha[:, group].float(), offset.float())
            values[:, members] = binary_coding.decode(self.codes[:, members], levels)
        return values

    def nbytes(self) -> int:
        rows, columns = self.codes.shape
        offsets = 0 if self.offset is None else self.offset.numel() * self.offset.element_size()
        return -(-rows * columns * self.grid.bits // 8) + self.alpha.numel() * self.alpha.element_size() + offsets

    def rows(self, start: int, stop: int) -> BinaryCoded:
        """The same for outputs `start` to `stop` only."""
        offset = None if self.offset is None else self.offset[start:stop]
        return replace(self, codes=self.codes[start:stop], alpha=self.alpha[start:stop], offset=offset)

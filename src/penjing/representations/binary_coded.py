"""A matrix as a few planes of signs and the scales that multiply them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics import binary_coding
from penjing.numerics.binary_coding import BinaryGrid, Levels


@dataclass(frozen=True)
class BinaryCoded:
    """Codes on a `BinaryGrid`.

    codes        uint8 (N, K): bit i is 1 where the sign of plane i is +1
    alpha        (N, G, bits) in the grid's `scale_dtype`
    offset       (N, G) in the grid's `offset_dtype`; None on a grid without offsets
    grid         the grid the codes lie on
    group_index  int32 (K,): the group each column belongs to; None when groups are consecutive columns
    inputs       (K,) in the grid's `inputs_dtype`: what each column is multiplied by; None on a grid without
    """

    codes: Tensor
    alpha: Tensor
    offset: Tensor | None
    grid: BinaryGrid
    group_index: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dense(self) -> Tensor:
        """The decoded matrix in fp32: `sum_i +-alpha_i + offset`, summed in this order, times the input's factor."""
        values = torch.empty(self.codes.shape, device=self.codes.device)
        for group, members in enumerate(self.members()):
            offset = self.alpha.new_zeros(len(self.codes)) if self.offset is None else self.offset[:, group]
            levels = Levels(self.alpha[:, group].float(), offset.float())
            values[:, members] = binary_coding.decode(self.codes[:, members], levels)
        return values if self.inputs is None else values * self.inputs.float()

    def members(self) -> Sequence[slice | Tensor]:
        """The columns of each group."""
        columns = self.codes.shape[1]
        if self.group_index is not None:
            return [(self.group_index == group).nonzero()[:, 0] for group in range(self.alpha.shape[1])]
        width = self.grid.columns_per_group(columns)
        return [slice(start, start + width) for start in range(0, columns, width)]

    def nbytes(self) -> int:
        rows, columns = self.codes.shape
        beside = (part for part in (self.alpha, self.offset, self.group_index, self.inputs) if part is not None)
        return -(-rows * columns * self.grid.bits // 8) + sum(part.numel() * part.element_size() for part in beside)

    def rows(self, start: int, stop: int) -> BinaryCoded:
        """The same for outputs `start` to `stop` only."""
        offset = None if self.offset is None else self.offset[start:stop]
        return replace(self, codes=self.codes[start:stop], alpha=self.alpha[start:stop], offset=offset)

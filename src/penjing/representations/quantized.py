"""Codes and what turns them back into values. Codes are kept unpacked here; `formats` decide how they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics.float_grids import FloatGrid, ScaledGrid
from penjing.numerics.scale_codes import ScaleCodes
from penjing.numerics.strips import strips
from penjing.representations.bilevel import Bilevel
from penjing.representations.binary_coded import BinaryCoded
from penjing.representations.codebook import Codebook
from penjing.representations.vector_coded import VectorCoded


@dataclass(frozen=True)
class Quantized:
    """Codes on a grid.

    codes       (N, K) in the grid's `code_dtype`; on an integer grid int8, signed: -2**(bits-1) <= code < 2**(bits-1)
    scale       (N, G) in the grid's `scale_dtype`; fp32 where a file holds scales in coded form
    zero_point  (N, G) in the grid's `zero_dtype`: int8, signed like the codes, or any number in the type of scales;
                on a grid with minima, those; None when the grid is symmetric
    grid        the grid the codes lie on
    group_index int32 (K,): the group each column belongs to; None when groups are consecutive columns
    scale_codes what a file holds instead of `scale`, which they decode to; None where it holds `scale`
    zero_codes  the same for minima
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: ScaledGrid
    group_index: Tensor | None = None
    scale_codes: ScaleCodes | None = None
    zero_codes: ScaleCodes | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dense(self) -> Tensor:
        """The decoded matrix in fp32: `scale * (codes - zero_point)`, exact products of stored numbers."""
        values, columns = torch.empty(self.codes.shape, device=self.codes.device), self.codes.shape[1]
        pieces = [slice(None)] if self.scale.requires_grad else strips(self.codes.shape)
        for rows in pieces:  # autograd would copy the whole gradient for every strip
            scale = self._per_column(self.scale[rows].float(), columns)
            zero = 0.0 if self.zero_point is None else self._per_column(self.zero_point[rows].float(), columns)
            values[rows] = self.grid.decode(self.codes[rows].float(), scale, zero)
        return values

    def _per_column(self, per_group: Tensor, columns: int) -> Tensor:
        if self.group_index is not None:
            return per_group[:, self.group_index.long()]
        return self.grid.spread(per_group, columns)

    def nbytes(self) -> int:
        rows, columns = self.codes.shape
        if isinstance(self.grid, FloatGrid):
            order = 0 if self.group_index is None else columns * 4
            return -(-rows * columns * self.grid.bits // 8) + self.grid.scale_bytes(self.codes.shape) + order
        scales = 1 if self.grid.group_size == "tensor" else self.scale.numel()
        zeros = 0 if self.zero_point is None else scales
        if self.grid.scale_bits:
            planes = 1 if self.zero_point is None else 2
            shared = scales // self.grid.groups_per_block * self.grid.scale_dtype.itemsize
            return -(-rows * columns * self.grid.bits // 8) + planes * (scales * self.grid.scale_bits // 8 + shared)
        order = 0 if self.group_index is None else columns * 4
        bits = self.grid.bits
        zero_bits = 8 * self.scale.element_size() if self.grid.zero != "integer" else bits
        codes = self.grid.code_bytes(rows * columns)
        return codes + scales * self.scale.element_size() + -(-zeros * zero_bits // 8) + order

    def rows(self, start: int, stop: int) -> Quantized:
        """The same for outputs `start` to `stop` only."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return replace(
            self,
            codes=self.codes[start:stop],
            scale=self.scale[start:stop],
            zero_point=zero_point,
            scale_codes=self.scale_codes and self.scale_codes.rows(start, stop),
            zero_codes=self.zero_codes and self.zero_codes.rows(start, stop),
        )


Coded = Quantized | Bilevel | BinaryCoded | Codebook | VectorCoded
"""Representations whose values lie on a grid."""

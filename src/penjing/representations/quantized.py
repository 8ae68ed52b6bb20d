"""Codes and what turns them back into values. Codes are kept unpacked here; `formats` decide how they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded matrix: `scale * (codes - zero_point)`, exact products of stored numbers, rounded to `dtype`.

        A gradient reaches the scales if they ask for one.
        """
        return _Decoded.apply(self.scale, replace(self, scale=self.scale.detach()), dtype)

    def decoded(self, rows: slice) -> Tensor:
        """Some outputs in fp32."""
        scale = self._spread(self.scale[rows].float())
        return self.grid.decode(self._fold(self.codes[rows].float()), scale, self._zero(rows)).flatten(1)

    def by_scale(self, rows: slice, gradient: Tensor) -> Tensor:
        """What a gradient (n, K) with respect to some outputs says of their scales: fp32 (n, G)."""
        change = self._fold(gradient.float()) * self.grid.slope(self._fold(self.codes[rows].float()), self._zero(rows))
        if self._even:
            return change.sum(-1)
        return change @ self._spread(torch.eye(self.scale.shape[1], device=change.device)).T

    @property
    def _even(self) -> bool:
        """Whether all groups are as many consecutive columns."""
        columns, groups = self.codes.shape[1], self.scale.shape[1]
        return self.group_index is None and self.grid.columns_per_group(columns) * groups == columns

    def _fold(self, matrix: Tensor) -> Tensor:
        """(n, K) as (n, G, K / G) where groups are even, so that what they share need not be repeated."""
        return matrix.unflatten(1, (self.scale.shape[1], -1)) if self._even else matrix

    def _spread(self, per_group: Tensor) -> Tensor:
        """(n, G), to be multiplied by what `_fold` gives."""
        if self._even:
            return per_group.unsqueeze(-1)
        if self.group_index is not None:
            return per_group[:, self.group_index.long()]
        return self.grid.spread(per_group, self.codes.shape[1])

    def _zero(self, rows: slice) -> Tensor | float:
        return 0.0 if self.zero_point is None else self._spread(self.zero_point[rows].float())

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


class _Decoded(torch.autograd.Function):
    """`Quantized.dense`, a strip at a time in both directions: autograd would keep fp32 matrices of its own."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, weight: Quantized, dtype: torch.dtype) -> Tensor:
        ctx.weight = weight
        values = torch.empty(weight.shape, dtype=dtype, device=scale.device)
        for rows in strips(weight.codes):
            values[rows] = weight.decoded(rows)
        return values

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        gradient = torch.empty_like(ctx.weight.scale)
        for rows in strips(outer):
            gradient[rows] = ctx.weight.by_scale(rows, outer[rows])
        return gradient, None, None


Coded = Quantized | Bilevel | BinaryCoded | Codebook | VectorCoded
"""Representations whose values lie on a grid."""

"""From fits of binary coding, and from codes on integer grids, to a binary-coded matrix in the types stored."""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.numerics.binary_coding import BinaryGrid, Levels
from penjing.numerics.grids import IntegerGrid
from penjing.representations import BinaryCoded, Masked, Quantized


class Coding:
    """A binary-coded matrix in the making."""

    def __init__(self, shape: tuple[int, ...], grid: BinaryGrid) -> None:
        rows, columns = shape
        self.grid = grid
        self.codes = torch.empty(rows, columns, dtype=torch.uint8)
        self.alpha = torch.empty(rows, grid.groups(columns), grid.bits, dtype=grid.scale_dtype)
        self.offset = torch.zeros(rows, grid.groups(columns))

    def put(self, group: int, members: slice | Tensor, levels: Levels, codes: Tensor) -> None:
        """Take in a group: the inputs it has, its levels as stored and codes (N, n)."""
        self.codes[:, members] = codes
        self.alpha[:, group] = levels.alpha.to(self.alpha.dtype)
        self.offset[:, group] = levels.offset

    def coded(self, kept: Tensor | None) -> BinaryCoded | Masked:
        """The whole, in the types that are stored."""
        offset = None if self.grid.offset_dtype is None else self.offset.to(self.grid.offset_dtype)
        values = BinaryCoded(self.codes, self.alpha, offset, self.grid)
        return values if kept is None else Masked(values, kept)


def coded_grid(grid: IntegerGrid) -> BinaryGrid:
    """The binary-coded grid on which every point of `grid` lies.

    An offset is half a step, or that and a whole number of steps when there is a zero point: the product of a 16-bit
    scale and a small number, which fp32 holds.
    """
    size = grid.group_size if isinstance(grid.group_size, int) else None
    return BinaryGrid(grid.bits, size, grid.scale_dtype, grid.scale_dtype if grid.symmetric else torch.float32)


def from_integer(weight: Quantized) -> BinaryCoded:
    """The same values as signed sums: exactly, when scales are stored in 16 bits.

    With u = code + 2**(bits-1), from 0 to 2**bits - 1, and u_i its bits,

        s (code - z) = sum_i (s 2^i / 2) (2 u_i - 1)  -  s (z + 1/2)

    A negative scale (rule `signed-max`) has its signs turned around, as alpha is positive. ValueError when groups are
    not consecutive, or the grid is not of integers.
    """
    if weight.group_index is not None or not isinstance(weight.grid, IntegerGrid):
        raise ValueError("codes in groups of scattered inputs, or on no integer grid, cannot be binary-coded")
    bits, scale = weight.grid.bits, weight.scale.float()
    zero = torch.zeros_like(scale) if weight.zero_point is None else weight.zero_point.float()
    grid = coded_grid(weight.grid)
    alpha = scale.abs().unsqueeze(-1) * 2.0 ** torch.arange(bits - 2, -2, -1)
    turned = weight.grid.spread(scale < 0, weight.codes.shape[1])
    codes = (weight.codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    codes = torch.where(turned, 2**bits - 1 - codes, codes)
    reversed_bits = torch.zeros_like(codes)
    for bit in range(bits):
        reversed_bits |= (codes >> bit & 1) << (bits - 1 - bit)
    offset = -scale * (zero + 0.5)
    return BinaryCoded(reversed_bits, alpha.to(grid.scale_dtype), offset.to(grid.offset_dtype), grid)

"""Which type of GGUF holds the codes of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from penjing.formats.gguf.blocks import Blocks, IntegerBlocks, TableBlocks, TernaryBlocks, TritBlocks
from penjing.formats.gguf.super_blocks import SuperBlocks
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.gguf_grids import GGUF_GRIDS
from penjing.numerics.grids import Grid, IntegerGrid
from penjing.numerics.ternary import TernaryGrid

PLAIN: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types of tensors that lie on no grid, by their dtype."""


def type_of(grid: Grid) -> str | None:
    """Name of the type whose codes are those of `grid`, as the gguf package has it ("Q4_0"); None if there is none.

    How a scale was chosen does not matter: two grids that differ in `scale_rule` only are one type.
    """
    return _TYPES.get(_essence(grid))


def blocks_of(grid: Grid) -> Blocks:
    """How codes on `grid` lie in the file; KeyError when no type holds them."""
    essence = _essence(grid)
    name = _TYPES[essence]
    if isinstance(grid, FloatGrid):
        return TableBlocks(grid)
    if isinstance(grid, TernaryGrid):
        return TritBlocks(grid)
    assert isinstance(grid, IntegerGrid)
    if grid.scale_bits:
        return SuperBlocks(grid)
    return TernaryBlocks(grid) if name == "TQ2_0" else IntegerBlocks(grid)


def _essence(grid: Grid) -> Grid:
    if isinstance(grid, TernaryGrid):
        return replace(grid, scale_rule="full", rule="least-squares")
    if isinstance(grid, IntegerGrid):
        return replace(grid, scale_rule="full", zero="integer" if grid.symmetric else grid.zero)
    return replace(grid, rounding="round") if isinstance(grid, FloatGrid) else grid


_TYPES: Mapping[Grid, str] = {
    **{_essence(grid): name.upper() for name, grid in GGUF_GRIDS.items()},
    FloatGrid("e2m1", 32, "e8m0"): "MXFP4",
}

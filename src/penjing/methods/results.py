"""From what a method computed in fp32 to a representation in the types that are stored."""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Masked, Quantized


def quantized(
    codes: Tensor, scale: Tensor, zero: Tensor, grid: IntegerGrid, group_index: Tensor | None = None
) -> Quantized:
    """A `Quantized` from codes (N, K), scale (N, G) and zero (N, G), in whatever types they were computed.

    Scales were already rounded to `grid.scale_dtype` by the grid, so this cast loses nothing.
    """
    return Quantized(
        codes=codes.to(torch.int8),
        scale=scale.to(grid.scale_dtype),
        zero_point=None if grid.symmetric else zero.to(torch.int8),
        grid=grid,
        group_index=group_index,
    )


def with_mask(values: Quantized, kept: Tensor | None) -> Quantized | Masked:
    """`values`, wrapped in the mask of an earlier pruning step when there is one."""
    return values if kept is None else Masked(values, kept)


def pruned(weight: Tensor, kept: Tensor, storage_dtype: torch.dtype) -> Masked:
    """Dense values in their storage type with everything outside `kept` exactly zero."""
    return Masked(Dense(torch.where(kept, weight, 0).to(storage_dtype)), kept)

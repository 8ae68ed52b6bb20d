"""From what a method computed in fp32 to a representation in the types that are stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penjing.numerics.float_grids import FloatGrid, ScaledGrid
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.scale_codes import ScaleCodes, encode_e8m0
from penjing.numerics.scale_search import fit_rows, searchable
from penjing.numerics.super_blocks import code_scales
from penjing.representations import Dense, Masked, Quantized


class Fit(NamedTuple):
    """Scale and zero point of every group of a matrix, fp32 (N, G), and how a file holds scales coded together."""

    scale: Tensor
    zero: Tensor
    scale_codes: ScaleCodes | None = None
    zero_codes: ScaleCodes | None = None


def fitted(weight: Tensor, grid: ScaledGrid, metric: Tensor | None = None) -> Fit:
    """The grid's scales for a matrix `weight` (N, K).

    metric  of a search for better ones, (K,) or (K, K), see `numerics.scale_search`; only where `searchable`
    """
    if isinstance(grid, IntegerGrid) and grid.scale_bits:
        scale, zero = fit_rows(weight, grid, metric)
        scales, zeros = code_scales(weight, scale, zero, grid, metric)
        return Fit(scales.decode(), torch.zeros_like(scale) if zeros is None else zeros.decode(), scales, zeros)
    if isinstance(grid, IntegerGrid) or searchable(grid):
        return Fit(*fit_rows(weight, grid, metric))
    together = grid.fit_coded(weight)
    if together is None:
        return Fit(*grid.fit_rows(weight))
    scale = together.decode()
    return Fit(scale, torch.zeros_like(scale), together)


def quantized(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: ScaledGrid,
    group_index: Tensor | None = None,
    scale_codes: ScaleCodes | None = None,
    zero_codes: ScaleCodes | None = None,
) -> Quantized:
    """A `Quantized` from codes (N, K), scale (N, G) and zero (N, G), in whatever types they were computed.

    Scales and zero points were already rounded to what is stored by the grid, so these casts lose nothing.
    `scale_codes` and `zero_codes` are those of `fitted`.
    """
    if isinstance(grid, FloatGrid):
        if grid.scale == "e8m0":
            scale_codes = encode_e8m0(scale)
        return Quantized(codes.to(grid.code_dtype), scale.to(grid.scale_dtype), None, grid, group_index, scale_codes)
    return Quantized(
        codes=codes.to(grid.code_dtype),
        scale=scale.to(grid.memory_dtype),
        zero_point=None if grid.symmetric else zero.to(grid.zero_dtype),
        grid=grid,
        group_index=group_index,
        scale_codes=scale_codes,
        zero_codes=zero_codes,
    )


def with_mask(values: Quantized, kept: Tensor | None) -> Quantized | Masked:
    """`values`, wrapped in the mask of an earlier pruning step when there is one."""
    return values if kept is None else Masked(values, kept)


def pruned(weight: Tensor, kept: Tensor, storage_dtype: torch.dtype) -> Masked:
    """Dense values in their storage type with everything outside `kept` exactly zero."""
    return Masked(Dense(torch.where(kept, weight, 0).to(storage_dtype)), kept)

"""SparseGPT: remove weights column by column, and let the weights not yet visited make up for it.

The same sweep as GPTQ (`penjing.numerics.sweep`), with H = X X^T and H^-1 = U^T U. Fixing weight j of a row at v
instead of w costs (w - v)^2 / U[j, j]^2, so the score of a weight is

    score_ij = (W_ij / U[j, j])^2

on the weights as they are when the sweep arrives. Unstructured: the lowest scores of a whole block of columns go, so
rows may differ in density. N:M: of every M columns the N lowest per row, decided when the sweep reaches them. With a
grid the survivors are rounded in the same pass, and the error of both is compensated.

Worked example. W = [[1, 2]], H = [[2, 1], [1, 1]] (undamped), half removed, one block:

    U = [[1, -1], [0, 1]]      scores = [[1, 4]]      column 0 goes: e_0 = 1 / 1, w_1 = 2 - 1 * (-1) = 3
    W_hat = [[0, 3]], loss 1; only masking, [[0, 2]], has loss 2.

Source: Frantar, Alistarh 2023, "SparseGPT" (arXiv:2301.00774), algorithm 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import GroupSize, LinearInput
from penjing.methods.pruning.options import SparsityOptions, check_pattern_fits
from penjing.methods.results import pruned, quantized
from penjing.numerics.cholesky import dead_columns, inverse_factor
from penjing.numerics.grids import IntegerGrid, ScaleRule
from penjing.numerics.masks import dropped_of, keep_largest
from penjing.numerics.sweep import block_bounds, sweep
from penjing.representations import Masked, Quantized, Scheme
from penjing.statistics import Gram


class SparseGPTOptions(SparsityOptions):
    """Recipe keys of SparseGPT; those of the grid count only when `bits` is given."""

    block_size: int = Field(128, ge=1, description="columns among which weights compete when there is no pattern")
    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean")
    bits: int | None = Field(None, ge=2, le=8, description="quantise the survivors in the same sweep; none: keep dense")
    group_size: GroupSize = 128
    symmetric: bool = Field(True, description="no zero point; the grid is centred on zero")
    scale_rule: ScaleRule = Field("full", description="how a symmetric scale follows from the largest weight")

    @model_validator(mode="after")
    def _groups_hold_patterns(self) -> Self:
        of = self.zeros_of[1] if self.zeros_of else 1
        if self.bits and isinstance(self.group_size, int) and self.group_size % of:
            raise ValueError(f"group_size {self.group_size} must be a multiple of the {of} of pattern {self.pattern}")
        return self

    def grid(self, scale_dtype: torch.dtype) -> IntegerGrid | None:
        """The grid of the survivors; None when they stay dense."""
        if self.bits is None:
            return None
        size = None if self.group_size == "channel" else self.group_size
        return IntegerGrid(self.bits, size, self.symmetric, self.scale_rule, scale_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        """Sparser, and on the grid when `bits` is given."""
        return replace(super().scheme(before, storage_dtype), grid=self.grid(storage_dtype))


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    grid: IntegerGrid | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    kept: Tensor | None = None,
    storage_dtype: torch.dtype = torch.bfloat16,
) -> Masked:
    """Prune `weight` (N, K) given `gram` (K, K), the sum of outer products of its inputs.

    Removes exactly the fraction `sparsity` (rounded down) of every block of `block_size` columns, or N of every M
    inputs (`pattern`). Weights outside `kept` are gone already; they count towards the sparsity and stay gone. Scales
    of groups are fitted to the current weights when the sweep reaches the group, others before it. Values that stay
    dense are rounded to `storage_dtype` inside the sweep, so that this error is compensated too.
    """
    dead = dead_columns(gram)
    weight = weight.float().masked_fill(dead if kept is None else dead | ~kept, 0)
    columns = weight.shape[1]
    factor, _ = inverse_factor(gram, damping)
    current = weight.T.contiguous()
    mask = _Mask(current, factor.diagonal(), kept)
    zeros, of = check_pattern_fits(pattern, columns) if pattern else (0, 1)
    rounding = None if grid is None else _Rounding(current, weight, grid)

    def begin_block(start: int, stop: int) -> None:
        if not pattern:
            mask.decide_together(start, stop, sparsity or 0)

    def fix_column(position: int, column: Tensor) -> Tensor:
        if pattern and position % of == 0:
            mask.decide_by_row(position, position + of, zeros)
        column = column * mask.kept[position]
        return rounding.fix(position, column) if rounding else column.to(storage_dtype).float()

    starts = {*(range(0, columns, of) if pattern else ()), *(rounding.starts if rounding else ())}
    sweep(current, factor, block_bounds(columns, block_size, starts), fix_column, begin_block)
    survivors = mask.kept.T.contiguous()
    return Masked(rounding.result(), survivors) if rounding else pruned(current.T, survivors, storage_dtype)


class _Mask:
    """Which weights of the columns visited so far survive: `kept`, bool (K, N)."""

    def __init__(self, current: Tensor, pivots: Tensor, kept: Tensor | None) -> None:
        self.kept = torch.ones_like(current, dtype=torch.bool) if kept is None else kept.T.contiguous()
        self._current, self._pivots = current, pivots.unsqueeze(1)

    def _scores(self, start: int, stop: int) -> Tensor:
        return (self._current[start:stop] / self._pivots[start:stop]).square()

    def decide_together(self, start: int, stop: int, sparsity: float) -> None:
        """All weights of these columns compete."""
        scores, still = self._scores(start, stop).flatten(), self.kept[start:stop]
        chosen = keep_largest(scores, dropped_of(len(scores), sparsity), still.flatten())
        self.kept[start:stop] = chosen.view_as(still)

    def decide_by_row(self, start: int, stop: int, drop: int) -> None:
        """In each row, the `drop` lowest of these columns go."""
        self.kept[start:stop] = keep_largest(self._scores(start, stop).T, drop, self.kept[start:stop].T).T


class _Rounding:
    """Rounds columns in order; `starts` maps the first column of each group to one past its last."""

    def __init__(self, current: Tensor, weight: Tensor, grid: IntegerGrid) -> None:
        columns = len(current)
        self._current, self._grid = current, grid
        self._width = grid.columns_per_group(columns)
        self._scale, self._zero = (part.T.contiguous() for part in grid.fit_rows(weight))
        self._codes = torch.empty_like(current, dtype=torch.int8)
        firsts = range(0, columns, self._width) if isinstance(grid.group_size, int) else range(0)
        self.starts = {first: min(first + self._width, columns) for first in firsts}

    def fix(self, position: int, column: Tensor) -> Tensor:
        """Values (N,) on the grid for a masked column; refits the scale at the first column of a group."""
        group = position // self._width
        if position in self.starts:
            members = self._current[position : self.starts[position]]
            self._scale[group], self._zero[group] = self._grid.fit(members.T)
        code = self._grid.encode(column, self._scale[group], self._zero[group])
        self._codes[position] = code
        return self._grid.decode(code, self._scale[group], self._zero[group])

    def result(self) -> Quantized:
        """What was rounded, once the sweep is over."""
        codes, scale, zero = (part.T.contiguous() for part in (self._codes, self._scale, self._zero))
        return quantized(codes, scale, zero, self._grid)


def linear(given: LinearInput, options: SparseGPTOptions) -> Masked:
    """Prune one linear, or with a pattern the stacked rows of several that share their inputs."""
    return sparsegpt(
        given.weight,
        given.statistics[Gram].value,
        options.sparsity,
        pattern=options.pattern,
        grid=options.grid(given.storage_dtype),
        block_size=options.block_size,
        damping=options.damping,
        kept=given.kept,
        storage_dtype=given.storage_dtype,
    )
